"""Which heads sit in which slot: read and checked in a thread, copied in between two steps, gone at a word.

Heads hold nothing of a request, so a slot is written whoever drafts from it: the next draft comes from the new ones.
"""

import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol

import torch

from engine.adapters.files import momentary
from engine.adapters.manager import sentence
from engine.config import EngineConfig
from engine.digest import file_digest
from engine.messages import LoadCode, SpeculatorSlot
from engine.native.decoder import NativeDecoder
from engine.native.drafting import NativeDrafter
from engine.runner.forward import Forward
from engine.speculation.heads import Ask, Drafter, Guess, TorchDrafter
from engine.speculation.loading import Limits, SpeculatorReader, SpeculatorTooLarge
from engine.speculation.slots import Ready, SlotTensors

# Digests that were replaced and are still understood.
MOST_ALIASES = 256


class LoadAnswer(Protocol):
    """Hears how a load went; `serving` is the digest that drafts now, "" when it failed and nothing does."""

    def __call__(self, error: str, transient: bool = False, serving: str = "", code: LoadCode = "") -> None: ...


@dataclass
class Load:
    """Heads on their way in; `replaced` are the digests whose requests shall follow to them."""

    future: Future[Ready]
    answers: list[LoadAnswer] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)


@dataclass
class Resident:
    """Heads in a slot."""

    digest: str
    adapter: str | None
    slot: int
    heads: int
    used: int


class Speculators:
    """LoadSpeculator and UnloadSpeculator, and the drafts. All methods belong to the engine's thread."""

    def __init__(self, forward: Forward, config: EngineConfig, base: str, wake: Callable[[], None]) -> None:
        spec = forward.spec
        self.total = config.speculator_slots
        limits = Limits(
            hidden=spec.hidden_size,
            tokens=spec.vocab_size,
            heads=config.speculator_heads,
            vocabulary=min(config.speculator_vocabulary, spec.vocab_size),
        )
        root, vocabulary = config.artifacts.absolute(), vocabulary_digest(config.model)
        self._reader = SpeculatorReader(root, base, vocabulary, limits, forward.dtype)
        self._drafter = choose_drafter(forward, limits, self.total)
        self._wake = wake
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="speculator-reader")
        self._loads: dict[str, Load] = {}
        self._residents: dict[str, Resident] = {}
        self._digests = [""] * (self.total + 1)
        self._aliases: OrderedDict[str, str] = OrderedDict()
        self._clock = count(1)

    def load(self, digest: str, path: str, replaces: str, answer: LoadAnswer) -> None:
        """Draft with `digest`, whose requests then include those of `replaces`. A second load joins the first."""
        if digest in self._residents:
            self._retire(replaces, digest)
            answer("", serving=digest)
            return
        if digest not in self._loads:
            self._loads[digest] = Load(self._thread.submit(self._read, digest, path))
            self._loads[digest].future.add_done_callback(lambda _: self._wake())
        self._loads[digest].answers.append(answer)
        self._loads[digest].replaced.append(replaces)

    def unload(self, digest: str, answer: LoadAnswer) -> None:
        """Draft no more with `digest`, from the next draft on. Heads that are not there are unloaded already."""
        if digest in self._loads:
            answer("these heads are still loading", transient=True)
            return
        self._evict(digest)
        answer("")

    @property
    def restless(self) -> bool:
        """Whether `settle` has something to install or to answer."""
        return any(load.future.done() for load in self._loads.values())

    def settle(self) -> None:
        """Between two steps: install what has been read, answer what is over."""
        if not self._loads:
            return
        for digest, load in list(self._loads.items()):
            if load.future.done():
                del self._loads[digest]
                self._finish(digest, load)

    def table(self) -> list[SpeculatorSlot]:
        """The heads that are loaded, for Status."""
        return [
            SpeculatorSlot(index=one.slot, digest=one.digest, adapter=one.adapter, heads=one.heads)
            for one in sorted(self._residents.values(), key=lambda one: one.slot)
        ]

    def slot(self, digest: str | None, adapter: str | None) -> int:
        """Where a request's heads are; 0 when none are loaded, or they know another adapter's states only."""
        if digest is None or not self._residents:
            return 0
        resident = self._residents.get(digest) or self._residents.get(self._aliases.get(digest, ""))
        if resident is None or resident.adapter != adapter:
            return 0
        resident.used = next(self._clock)
        return resident.slot

    def digest(self, slot: int) -> str:
        """What is in a slot; "" when nothing is."""
        return self._digests[slot]

    def heads(self, slot: int) -> int:
        """The most tokens a slot drafts at once; 0 when nothing is in it."""
        resident = self._residents.get(self._digests[slot])
        return resident.heads if resident else 0

    def propose(self, hidden_RE: torch.Tensor, asks: Sequence[Ask], floor: float = 0.0) -> list[Guess]:
        """One draft per ask; row i of `hidden_RE` [R, E] fp32 is the LM head's input that produced ask i's token.

        A row stops behind the token with which the product of its chances falls below `floor`.
        """
        return self._drafter.propose(hidden_RE, asks, floor)

    def close(self) -> None:
        """Let the reading thread end."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read(self, digest: str, path: str) -> Ready:
        return self._drafter.prepare(self._reader.read(digest, path))

    def _finish(self, digest: str, load: Load) -> None:
        error, broken = load.future.exception(), False
        if error is None:
            try:
                self._install(load.future.result(), load.replaced)
            except Exception as failure:
                # The artefact was found good: the machine's fault.
                traceback.print_exc(file=sys.stderr)
                error, broken = failure, True
        text, transient = sentence(error), broken or (error is not None and momentary(error))
        code: LoadCode = "too_large" if isinstance(error, SpeculatorTooLarge) else ""
        for answer, replaced in zip(load.answers, load.replaced, strict=True):
            serving = digest if error is None else replaced if replaced in self._residents else ""
            answer(text, transient, serving, code)

    def _install(self, ready: Ready, replaced: list[str]) -> None:
        speculator = ready.speculator
        slot = self._room(replaced)
        # Whoever was there is gone even when copying fails halfway.
        self._evict(self._digests[slot])
        self._drafter.fill(slot, ready)
        resident = Resident(speculator.digest, speculator.adapter, slot, speculator.heads, next(self._clock))
        self._residents[speculator.digest] = resident
        self._digests[slot] = speculator.digest
        self._aliases.pop(speculator.digest, None)
        for old in replaced:
            self._retire(old, speculator.digest)

    def _room(self, replaced: list[str]) -> int:
        """The slot of what is replaced, or a free one, or that of the heads nobody has named for longest."""
        for old in replaced:
            if old in self._residents:
                return self._residents[old].slot
        if "" in self._digests[1:]:
            return self._digests.index("", 1)
        return min(self._residents.values(), key=lambda one: one.used).slot

    def _retire(self, old: str, new: str) -> None:
        """From now on `old` means `new`."""
        if not old or old == new:
            return
        self._evict(old)
        for name in [name for name, target in self._aliases.items() if target == old]:
            self._aliases[name] = new
        self._aliases.pop(new, None)
        self._aliases[old] = new
        while len(self._aliases) > MOST_ALIASES:
            self._aliases.popitem(last=False)

    def _evict(self, digest: str) -> None:
        resident = self._residents.pop(digest, None)
        if resident is not None:
            self._digests[resident.slot] = ""
            self._drafter.clear(resident.slot)


def vocabulary_digest(model: Path) -> str:
    """SHA-256 of a model's tokenizer.json, which its heads must have been trained with; "" when it has none."""
    path = model / "tokenizer.json"
    return file_digest(path) if path.is_file() else ""


def choose_drafter(forward: Forward, limits: Limits, slots: int) -> Drafter:
    """The native path's where it runs the model, torch's elsewhere."""
    if isinstance(forward, NativeDecoder):
        return NativeDrafter(forward, limits, slots)
    return TorchDrafter(SlotTensors(limits, slots, forward.dtype, forward.device))
