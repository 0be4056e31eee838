"""What the worker tells the trainer process, and what that answers, line by line. No torch here."""

from typing import Any

import msgspec

REFUSED = 3  # exit status: a retry would refuse again


class ReferenceRow(msgspec.Struct, frozen=True):
    """A chat and the token ids the serving engine makes of it, for transformers to confirm."""

    messages: list[dict[str, Any]]
    ids: list[int]


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One training. Rows are in `rows_file`, one JSON object {"input_ids", "labels"} a line.

    `device` is "cpu", "cuda" or "auto"; `base` goes into the adapter's configuration; `parent` is the worker's pid.
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


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """Means since the last one. `memory_mb` is the process's resident set, on CUDA the device's peak."""

    step: int
    steps: int
    loss: float
    lr: float
    grad_norm: float | None
    tokens_per_second: float
    memory_mb: float
    accuracy: float | None = None


class Stage(msgspec.Struct, frozen=True, kw_only=True, tag="stage"):
    """The trainer has got somewhere: "loaded", "confirmed" (the reference renders alike), "saved"."""

    name: str
    detail: dict[str, Any] = {}


Report = Progress | Stage
encode = msgspec.json.encode
decode_spec = msgspec.json.Decoder(Spec).decode
decode_report: msgspec.json.Decoder[Progress | Stage] = msgspec.json.Decoder(Progress | Stage)
