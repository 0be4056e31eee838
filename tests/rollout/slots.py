"""An engine of adapter slots and nothing else, for tests in which no token is asked for."""

from typing import Any, Self

from engine.client import EngineRefused
from engine.messages import Slot, Status

TOO_HIGH = "rank 32 does not fit slots of rank 8"


class Slots:
    """An engine's adapter slots without its weights; what is named in `refuses` is never loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.refuses: set[str] = set()
        self.asked = 0

    def status(self) -> Status:
        slots = [
            Slot(index=place, digest=digest, state="ready", references=0) for place, digest in enumerate(self.loaded)
        ]
        figures: dict[str, Any] = dict.fromkeys(
            ("threads", "running", "waiting", "blocks_total", "blocks_free", "steps"), 0
        )
        figures |= {"generated_tokens": 0, "uptime_seconds": 0.0, "pid": 0, "max_context": 64, "slots_total": 4}
        names = {"id": "s", "base": "base", "model": "m", "dtype": "fp32", "device": "cpu"}
        return Status(epoch=1, slots=slots, **names, **figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def load_adapter(self, digest: str, _path: str) -> None:
        self.asked += 1
        if digest in self.refuses:
            raise EngineRefused(TOO_HIGH)
        self.loaded.append(digest)

    def unload_adapter(self, digest: str, *, seconds: float | None = None) -> None:
        self.loaded.remove(digest)
