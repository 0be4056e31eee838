"""Which adapter sits in which slot, who still reads it, and who must leave when there is no room.

The slot tensors are fixed and copied into in place. A slot is written only while nobody refers to it, between steps.
"""

from dataclasses import dataclass
from itertools import count

from engine.adapters.loading import Adapter
from engine.messages import Slot
from engine.runner.forward import Forward


@dataclass
class Resident:
    """An adapter in a slot. `draining` ones take no new requests and leave at zero references."""

    digest: str
    slot: int
    references: int = 0
    used: int = 0
    draining: bool = False


class AdapterSlots:
    """Slots 1 .. total; slot 0 means no adapter. One is kept spare, so that a swap need not wait for anybody."""

    def __init__(self, forward: Forward, total: int, rank: int) -> None:
        forward.add_slots(total, rank)
        if forward.score is not None:
            forward.score.add_slots(total)
        self._forward = forward
        self._residents: dict[str, Resident] = {}
        self._free = list(range(total, 0, -1))
        self._clock = count(1)
        self.total = total

    def get(self, digest: str) -> Resident | None:
        """The adapter if it is in a slot, draining or not."""
        return self._residents.get(digest)

    def ready(self, digest: str) -> bool:
        """Whether new requests for it are taken."""
        resident = self._residents.get(digest)
        return resident is not None and not resident.draining

    def acquire(self, digest: str) -> int:
        """Refer to a ready adapter; returns its slot, valid until the matching release."""
        resident = self._residents[digest]
        assert not resident.draining, "a draining adapter takes no new requests"
        resident.references += 1
        resident.used = next(self._clock)
        return resident.slot

    def release(self, digest: str) -> None:
        """Undo one acquire. A draining adapter without references leaves its slot."""
        resident = self._residents[digest]
        assert resident.references > 0, f"{digest} was released more often than acquired"
        resident.references -= 1
        if resident.draining and not resident.references:
            self._evict(resident)

    def drain(self, digest: str) -> None:
        """Take no new requests; leave the slot as soon as nobody refers to it."""
        resident = self._residents[digest]
        resident.draining = True
        if not resident.references:
            self._evict(resident)

    def revive(self, digest: str) -> None:
        """Open a draining adapter for new requests again."""
        self._residents[digest].draining = False

    @property
    def has_room(self) -> bool:
        """Whether make_room would say yes."""
        return bool(self._free) or any(not resident.references for resident in self._residents.values())

    def make_room(self) -> bool:
        """Whether a slot is free now, after evicting the least recently used unreferenced adapter if need be.

        When all are referenced, the least recently used one starts to drain, so that a newcomer cannot starve.
        """
        if not self._free:
            self._evict_unreferenced(keep=None)
        if not self._free and not any(resident.draining for resident in self._residents.values()):
            self.drain(min(self._residents.values(), key=lambda resident: resident.used).digest)
        return bool(self._free)

    def install(self, adapter: Adapter) -> int:
        """Copy a checked adapter into a free slot (make_room said there is one) and open it for requests.

        When copying fails the slot stays free: nobody reads what is in it.
        """
        slot = self._free[-1]
        for layer in range(self._forward.spec.layers):
            for name in ("qkv", "o", "gate_up", "down"):
                self._forward.fill(slot, layer, name, *adapter.matrices(layer, name))
        self._forward.fill(slot, None, "head", *adapter.matrices(None, "head"))
        if self._forward.score is not None:
            self._forward.score.fill(slot, adapter.score, adapter.score_delta)
        self._free.pop()
        self._residents[adapter.digest] = Resident(adapter.digest, slot, used=next(self._clock))
        if not self._free:
            self._evict_unreferenced(keep=adapter.digest)
        return slot

    def table(self, loading: list[str]) -> list[Slot]:
        """The slots as Status reports them; those loading have no slot yet and show index 0."""
        held = [
            Slot(
                index=resident.slot,
                digest=resident.digest,
                state="draining" if resident.draining else "ready",
                references=resident.references,
            )
            for resident in sorted(self._residents.values(), key=lambda resident: resident.slot)
        ]
        return held + [Slot(index=0, digest=digest, state="loading", references=0) for digest in loading]

    def _evict_unreferenced(self, keep: str | None) -> None:
        idle = [r for r in self._residents.values() if not r.references and r.digest != keep]
        if idle:
            self._evict(min(idle, key=lambda resident: resident.used))

    def _evict(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self._free.append(resident.slot)
