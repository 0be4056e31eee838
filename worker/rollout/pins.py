"""Withdraws pinned answers that live weights give themselves: the adapter has learned them, and reaches further.

Asked after every change of the weights. An answer counts as learned when the weights say it to the letter to its own
request: greedily, and where the request is sampled in every one of a few draws with its own parameters too.
"""

from collections.abc import Sequence
from uuid import UUID

import msgspec
import structlog

from engine.messages import Generate, logged_grammar, logged_sampling
from engine.sync_client import SyncEngineClient
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import deployments, pins
from services.store.jobs import Lease
from services.store.models import Pin

CONNECT_SECONDS = 30.0
PAGE = 50
AT_ONCE = 8
DRAWS = 4

log = structlog.get_logger()


def check_pins_job(lease: Lease, settings: Settings) -> None:
    """Handler of "pins.check". Ends early when other weights serve by now: their own job asks about them."""
    project_id, generation = UUID(lease.payload["project_id"]), int(lease.payload["generation"])
    digest = str(lease.payload["digest"])
    tokenizer = Tokenizer.load(settings.model_path)
    asked, known, after = 0, 0, None
    with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
        client.load_adapter(digest, str(settings.artifacts / digest))
        while True:
            with lease.sessions() as session:
                page = pins.to_check(session, project_id, after, PAGE)
            if not page or lease.cancelled():
                break
            learned = [pin.id for pin in page if knows(client, tokenizer, digest, pin)]
            with lease.transaction() as session:
                if deployments.locked(session, project_id).generation != generation:
                    return
                pins.learned(session, learned, digest)
            asked, known, after = asked + len(page), known + len(learned), page[-1].id
    log.info("pins checked", digest=digest, asked=asked, learned=known)


def knows(client: SyncEngineClient, tokenizer: Tokenizer, digest: str, pin: Pin) -> bool:
    """Whether these weights give the pinned answer themselves. Raises EngineGone."""
    requests = _requests(tokenizer, digest, pin)
    greedy = client.generate(requests[0])
    if not _says(tokenizer, greedy.token_ids, greedy.finished.adapter, digest, pin):
        return False
    draws = client.generate_many(requests[1:], concurrency=AT_ONCE)
    return all(_says(tokenizer, draw.token_ids, draw.finished.adapter, digest, pin) for draw in draws)


def _says(tokenizer: Tokenizer, token_ids: Sequence[int], adapter: str | None, digest: str, pin: Pin) -> bool:
    """Up to the request's first stop string, as its caller would see it."""
    text = tokenizer.decode(list(token_ids))
    cuts = [at for stop in pin.parameters.get("stop") or () if (at := text.find(stop)) >= 0]
    return adapter == digest and text[: min(cuts, default=len(text))] == pin.answer


def _requests(tokenizer: Tokenizer, digest: str, pin: Pin) -> list[Generate]:
    """The pinned request greedily, then as it is with other seeds."""
    own = logged_sampling(pin.parameters, seed=0)
    prompt = tokenizer.encode_chat(pin.messages)
    draws = [msgspec.structs.replace(own, seed=seed) for seed in range(DRAWS)] if own.temperature else []
    return [
        Generate(
            id=f"pin-{pin.id.hex}-{index}",
            prompt=prompt,
            sampling=sampling,
            adapter=digest,
            namespace="verify",
            priority="batch",
            grammar=logged_grammar(pin.parameters),
            learn=False,
        )
        for index, sampling in enumerate([msgspec.structs.replace(own, temperature=0.0), *draws])
    ]
