"""What the worker tells the trainer process, and what that answers, line by line. No torch here."""

from datetime import datetime
from typing import Any

import msgspec

REPORT = "report.json"  # what the trainer of heads measured, beside what it wrote
REFUSED = 3  # exit status: a retry would refuse again


class ReferenceRow(msgspec.Struct, frozen=True):
    """A chat and the token ids the serving engine makes of it, for transformers to confirm; `at`: when it was asked."""

    messages: list[dict[str, Any]]
    ids: list[int]
    tools: list[dict[str, Any]] = []
    at: datetime | None = None


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One training. Rows are in `rows_file`, one JSON object a line, with the columns that TRL's collator for `kind`
    reads; `validation_file` ("" for none) holds rows of other groups: {"prompt_ids", "good_ids", "bad_ids"}.

    `device` is "cpu", "cuda" or "auto"; `base` goes into the adapter's configuration; `parent` is the worker's pid.
    `resume` is a whole checkpoint to go on from ("" for none), `fingerprint` what checkpoints of this training bear.
    """

    model: str
    base: str
    rows_file: str
    out: str
    parent: int
    device: str
    rank: int
    alpha: float
    lr: float
    epochs: float
    max_steps: int
    batch_size: int
    warmup: float
    seed: int
    targets: list[str]
    reference: list[ReferenceRow] = []
    kind: str = "sft"
    beta: float = 0.1
    sft_weight: float = 0.0
    label_smoothing: float = 0.0
    good_weight: float = 1.0
    bad_weight: float = 1.0
    quantize: str = "none"
    devices: int = 1
    checkpoint_steps: int = 0
    validation_file: str = ""
    sweep: int = 0
    resume: str = ""
    fingerprint: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Means since the last one. `memory_mb` is the process's resident set, on CUDA the device's peak; `eta` seconds.

    `margin` is the mean reward of the better answers less that of the worse, `preferred` the share of pairs whose
    better answer has the larger one, `kl` the estimated distance from the base.
    """

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens_per_second: float
    memory_mb: float
    accuracy: float | None = None
    margin: float | None = None
    preferred: float | None = None
    kl: float | None = None
    eta: float | None = None


class Validated(msgspec.Struct, frozen=True, kw_only=True, tag="validation"):
    """On the validation rows: nats a token of the right answers, and the share of pairs whose better answer is the
    likelier one (None without pairs)."""

    step: int
    loss: float
    preferred: float | None = None


class Trial(msgspec.Struct, frozen=True, kw_only=True, tag="trial"):
    """A candidate of a sweep after a rung: what it changes, the steps it got, its validation, whether it goes on."""

    candidate: int
    rung: int
    changes: dict[str, float]
    steps: int
    loss: float
    preferred: float | None
    kept: bool


class Stage(msgspec.Struct, frozen=True, kw_only=True, tag="stage"):
    """The trainer has got somewhere: "loaded", "confirmed" (the reference renders alike), "saved"."""

    name: str
    detail: dict[str, Any] = {}


class Request(msgspec.Struct, frozen=True):
    """One logged prompt and answer, as token ids, with what drew it. `group` names whose sessions stand together."""

    prompt: list[int]
    answer: list[int]
    temperature: float = 0.0
    seed: int = 0
    choice: int = 0
    group: str = ""


class HeadsSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One training of speculator heads. Requests are in `rows_file`, oldest first, one JSON object a line.

    `adapter` is the directory of the adapter being served ("" for the base), `champion` that of the heads to start from
    and to be compared with. The speculator and report.json are written into `out`; `checkpoint` is a directory that
    outlives attempts. `max_tokens` is how many tokens, prompts included, are read at most. `parent` is the worker's pid
    (0: a caller in this process); `precision`, `device` and `adapter_rank` are the engine's.
    """

    model: str
    rows_file: str
    out: str
    checkpoint: str = ""
    adapter: str = ""
    champion: str = ""
    parent: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    heads: int = 4
    vocabulary: int = 1024
    conditioning: str = "hydra"
    lr: float = 1e-2
    epochs: float = 3.0
    batch_tokens: int = 512
    adapter_rank: int = 32
    max_tokens: int = 500_000
    seed: int = 0


class HeadsProgress(msgspec.Struct, frozen=True, kw_only=True, tag="heads"):
    """How far heads are. `tau` is tokens a step on the held-out answers, None before it was measured; `eta` seconds."""

    step: int
    steps: int
    loss: float
    tau: float | None
    tokens_per_second: float
    eta: float


Report = Progress | Validated | Trial | Stage | HeadsProgress
encode = msgspec.json.encode
decode_spec = msgspec.json.Decoder(Spec).decode
decode_heads_spec = msgspec.json.Decoder(HeadsSpec).decode
decode_report: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)
