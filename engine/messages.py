"""What crosses the engine's process boundary: msgspec structs, msgpack on the wire.

Clients (gateway, worker) hold a DEALER socket, the engine a ROUTER socket on a private ipc path. Every
message from the engine carries its *epoch*, a random number chosen at start: when a client sees it change,
every request it had in flight died with the old engine and must be failed, never awaited.

The engine knows neither text nor projects. Prompts arrive as token ids; adapters are named by the digest of
their manifest; `namespace` and `cache_salt` are opaque strings that isolate tenants.
"""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

ErrorCode = Literal[
    "",
    "prompt_too_long",
    "adapter_not_loaded",
    "invalid_request",
    "overloaded",
    "deadline",
    "unsupported",
    "internal",
]
FinishReason = Literal["stop", "length", "cancelled", "error"]
Priority = Literal["interactive", "batch"]
SlotState = Literal["loading", "ready", "draining"]
Pooling = Literal["last", "mean", "first", "classify"]
Drafter = Literal["suffix", "heads"]
LoadCode = Literal["", "too_large"]


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    Noise is a hash of (seed, choice, position, token id), so a seed gives the same tokens alone or batched. Presence
    and frequency penalties count the answer's tokens, the repetition penalty the prompt's too. `top_logprobs` asks for
    that many of the model's most likely tokens beside each chosen one. Before `min_tokens` no stop token is drawn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    top_logprobs: int = 0


class Grammar(msgspec.Struct, frozen=True, kw_only=True):
    """What the answer must be: `text` is a JSON schema, a regular expression or an llguidance (Lark) grammar."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


def logged_sampling(parameters: Mapping[str, Any], **changed: object) -> Sampling:
    """How a request was sampled, from its logged parameters and what is `changed` of them. Nobody asks again for the
    likely tokens."""
    names = set(Sampling.__struct_fields__) - {"top_logprobs"}
    known = {name: value for name, value in parameters.items() if name in names}
    return msgspec.convert({**known, **changed}, Sampling, strict=False)


def logged_grammar(parameters: Mapping[str, Any]) -> Grammar | None:
    """What a logged request's answer had to be."""
    found = parameters.get("grammar")
    return msgspec.convert(found, Grammar) if found else None


# --- client to engine -------------------------------------------------------------------------------------


class Generate(msgspec.Struct, tag="generate", frozen=True, kw_only=True):
    """Run one prompt. `adapter` is a digest that is loaded, or None for the base model.

    `share` names whose fair share of the engine this request counts against (opaque; a key). `deadline_seconds` after
    its arrival the request ends as `error`/`deadline` wherever it is; 0 means never. `prompt_logprobs` asks for
    `PromptLogprobs` before the first token. KV is shared only between requests of equal adapter and `cache_salt`.

    `speculator` is the digest of heads to draft with; while they are not loaded the row does without, never an error.
    `speculate` False drafts nothing: the baseline that speed is measured against. `learn` says whether the answer joins
    the suffix corpus of `namespace`. None of the three changes a token.
    """

    id: str
    prompt: list[int]
    sampling: Sampling
    adapter: str | None = None
    namespace: str = ""
    cache_salt: str = ""
    priority: Priority = "interactive"
    choice: int = 0
    grammar: Grammar | None = None
    share: str = ""
    deadline_seconds: float = 0.0
    prompt_logprobs: bool = False
    speculator: str | None = None
    speculate: bool = True
    learn: bool = True


class Pool(msgspec.Struct, tag="pool", frozen=True, kw_only=True):
    """Run one prompt for a vector, not for tokens: answered by one `Pooled`, or by `Finished` with an error.

    `last`, `mean` and `first` pool the final hidden states; `classify` gives the scores of a classification head.
    """

    id: str
    prompt: list[int]
    how: Pooling = "last"
    adapter: str | None = None
    namespace: str = ""
    cache_salt: str = ""
    priority: Priority = "interactive"
    share: str = ""
    deadline_seconds: float = 0.0
    # Second segment of a pair (encoders): the first token that has token type 1; 0 when there is none.
    pair_start: int = 0


class Cancel(msgspec.Struct, tag="cancel", frozen=True, kw_only=True):
    """Stop a request whose client is gone or has read enough. Unknown ids are ignored: they finished first."""

    id: str


class LoadAdapter(msgspec.Struct, tag="load_adapter", frozen=True, kw_only=True):
    """Load an adapter beside those that serve. `path` is an artefact directory below the engine's artefact root."""

    id: str
    digest: str
    path: str


class UnloadAdapter(msgspec.Struct, tag="unload_adapter", frozen=True, kw_only=True):
    """Stop admitting requests for `digest` and free its slot when the last running one has finished."""

    id: str
    digest: str


class LoadSpeculator(msgspec.Struct, tag="load_speculator", frozen=True, kw_only=True):
    """Load heads beside those that draft, or in the place of `replaces`, whose requests go on with them."""

    id: str
    digest: str
    path: str
    replaces: str = ""


class UnloadSpeculator(msgspec.Struct, tag="unload_speculator", frozen=True, kw_only=True):
    """Stop drafting with `digest`, from the next step on; its requests go on without."""

    id: str
    digest: str


class Learn(msgspec.Struct, tag="learn", frozen=True, kw_only=True):
    """Add past responses, oldest first, to a namespace's suffix corpus: what an engine that starts must be told."""

    id: str
    namespace: str
    responses: list[list[int]]


class Forget(msgspec.Struct, tag="forget", frozen=True, kw_only=True):
    """Drop everything kept for a namespace (suffix corpora, cached KV of its salts)."""

    id: str
    namespace: str


class GetStatus(msgspec.Struct, tag="get_status", frozen=True, kw_only=True):
    """Ask for a `Status`."""

    id: str


# --- engine to client -------------------------------------------------------------------------------------


class Draft(msgspec.Struct, frozen=True, array_like=True):
    """One draft that a step verified: `accepted` of its `drafted` tokens came out, the first ones.

    `won` is False for the lesser of two drafts verified side by side: nothing was emitted from it. `ended` says that
    the answer was over with the last accepted token: what stood behind it was never judged, neither right nor wrong.
    """

    drafter: Drafter
    drafted: int
    accepted: int
    won: bool = True
    ended: bool = False


class Tokens(msgspec.Struct, tag="tokens", frozen=True, kw_only=True):
    """Newly accepted tokens of one request, in order; `logprobs[i]` is the natural log of the model's own
    (temperature 1, unfiltered) probability of `token_ids[i]`."""

    epoch: int
    id: str
    token_ids: list[int]
    logprobs: list[float]
    # For each token, where asked for: the most likely (token, logprob) pairs, best first.
    top: list[list[tuple[int, float]]] = []
    # With the first token: prompt tokens found in the prefix cache. Who cancels never sees a Finished.
    cached_tokens: int = 0
    # The steps these tokens took and the drafts verified in them. `speculator`: the digest of the heads among these.
    steps: int = 1
    drafts: list[Draft] = []
    speculator: str = ""


class PromptLogprobs(msgspec.Struct, tag="prompt_logprobs", frozen=True, kw_only=True):
    """For every prompt token but the first, its log-probability given those before it; `top` as in `Tokens`."""

    epoch: int
    id: str
    logprobs: list[float]
    top: list[list[tuple[int, float]]] = []


class Pooled(msgspec.Struct, tag="pooled", frozen=True, kw_only=True):
    """The answer to a `Pool`: one vector of little-endian fp32, and where the time went."""

    epoch: int
    id: str
    vector: bytes
    prompt_tokens: int
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    total_seconds: float = 0.0


class Finished(msgspec.Struct, tag="finished", frozen=True, kw_only=True):
    """The single ending of a request. `reason` "error" comes with `error` (a sentence) and `code`.

    `adapter` is the digest that really produced the tokens. Times are seconds measured inside the engine.
    """

    epoch: int
    id: str
    reason: FinishReason
    adapter: str | None = None
    error: str | None = None
    code: ErrorCode = ""
    # With `overloaded`: when trying again makes sense.
    retry_after_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


class Done(msgspec.Struct, tag="done", frozen=True, kw_only=True):
    """Answer to loads, unloads, Learn and Forget. `error` empty means it took effect; `serving` is the digest that a
    LoadSpeculator left in its slot.

    A load is answered when the adapter is ready to serve, an unload when its slot is free. `transient` errors (the
    file could not be read just now) say nothing about the artefact and may be tried again. `code` "too_large": this
    engine's slots are too small for the heads, which are good where a setting is raised.
    """

    epoch: int
    id: str
    error: str = ""
    transient: bool = False
    serving: str = ""
    code: LoadCode = ""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter slot as it stands: how many unfinished requests read it."""

    index: int
    digest: str
    state: SlotState
    references: int


class SpeculatorSlot(msgspec.Struct, frozen=True, kw_only=True):
    """Heads that are loaded, and the adapter whose states they were trained on (None: the base)."""

    index: int
    digest: str
    adapter: str | None
    heads: int


class Corpus(msgspec.Struct, frozen=True, kw_only=True):
    """What the suffix drafter holds of one namespace."""

    namespace: str
    tokens: int
    bytes: int


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds of a step of so many rows and tokens behind so much context: what drafting is weighed with."""

    rows: int
    tokens: int
    context: int
    milliseconds: float


class Status(msgspec.Struct, tag="status", frozen=True, kw_only=True):
    """What the engine is and does now. `base` is the SHA-256 digest of the base model's weights and config."""

    epoch: int
    id: str
    base: str
    model: str
    dtype: str
    device: str
    threads: int
    max_context: int
    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    slots: list[Slot]
    slots_total: int
    steps: int
    generated_tokens: int
    uptime_seconds: float
    pid: int
    # What multiplies: "torch", or "native" with its instruction set.
    kernels: str = "torch"
    # An encoder pools and cannot generate. `labels` name a classification head's scores, in order; such models
    # do not generate either.
    encoder: bool = False
    labels: list[str] = []
    speculators: list[SpeculatorSlot] = []
    speculators_total: int = 0
    corpora: list[Corpus] = []
    # The most tokens of a corpus, separators included; 0 where nothing is drafted.
    corpus_capacity: int = 0
    costs: list[StepCost] = []


ToEngine = (
    Generate
    | Pool
    | Cancel
    | LoadAdapter
    | UnloadAdapter
    | LoadSpeculator
    | UnloadSpeculator
    | Learn
    | Forget
    | GetStatus
)
FromEngine = Tokens | PromptLogprobs | Pooled | Finished | Done | Status

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
