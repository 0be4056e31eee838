"""Second answers: a share of a window's prompts asked again at batch priority, of the candidate or of what serves.

An answer that differs makes its interaction a pair, and claims it for the strategy "disagreement". Everything here is
a nomination: while the engine is away, or for prompts it refuses, there is simply no second answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from engine.client import Completion
from engine.messages import Generate, logged_grammar, logged_sampling
from engine.sync_client import SyncEngineClient
from engine.text.stops import StopStrings
from engine.text.tokenizer import Tokenizer
from services.settings import Settings
from services.store import shadow_answers
from services.store.models import Interaction, InteractionBody

# Of one sampling job, however many windows it closes.
MOST_ASKED = 200
AT_ONCE = 8
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 120.0
# The share asked while a candidate is on trial, where the project names none.
CANDIDATE_SHARE = 0.05
# The same weights asked greedily would say the same again.
LEAST_TEMPERATURE = 0.7

log = structlog.get_logger()


class Asked(NamedTuple):
    """A logged prompt to ask again, and what was answered the first time."""

    id: UUID
    prompt: list[int]
    parameters: dict[str, Any]
    output: str
    tokenizer_hash: str
    namespace: str


class Second(NamedTuple):
    """Another answer to the same prompt; `digest` is the adapter that gave it, None the base."""

    output: str
    digest: str | None
    differs: bool

    @property
    def alternative(self) -> dict[str, str | None]:
        """As a review item keeps it."""
        return {"output": self.output, "digest": self.digest}


def read(session: Session, ids: Sequence[UUID]) -> list[Asked]:
    """What can be asked again of these: one choice, no tools (a call has no words to prefer), a known prompt."""
    rows = session.execute(
        select(
            Interaction.id, InteractionBody.prompt_token_ids, InteractionBody.parameters, InteractionBody.output,
            InteractionBody.tokenizer_hash, Interaction.namespace,
        ).join(InteractionBody, InteractionBody.id == Interaction.id).where(Interaction.id.in_(ids))
    )  # fmt: skip
    return [
        one
        for one in (Asked(*row) for row in rows)
        if one.prompt
        and one.parameters.get("n", 1) == 1
        and "max_tokens" in one.parameters
        and "tools" not in one.parameters
    ]


def shadowed(session: Session, project_id: UUID) -> dict[UUID, Second]:
    """Second answers that are there already: what a candidate said in the shadow to the prompts of live traffic."""
    return {one: Second(*said) for one, said in shadow_answers.texts(session, project_id).items()}


def ask(
    settings: Settings, asked: Sequence[Asked], adapter: str | None, *, candidate: bool, alive: Callable[[], None]
) -> Mapping[UUID, Second]:
    """Second answers by `adapter`, as many as there are to be had. `alive` is called between batches and may raise.

    A candidate is asked exactly as the app asked; what serves is asked with other noise, and never greedily.
    """
    answers: dict[UUID, Second] = {}
    if not asked:
        return answers
    try:
        tokenizer = Tokenizer.load(settings.model_path)
        known = [one for one in asked if one.tokenizer_hash == tokenizer.digest]
        with SyncEngineClient(settings.engine_socket, connect_seconds=CONNECT_SECONDS) as client:
            for start in range(0, len(known), AT_ONCE):
                batch = known[start : start + AT_ONCE]
                requests = [_request(one, adapter, candidate=candidate) for one in batch]
                for one, completion in zip(batch, client.generate_many(requests, concurrency=AT_ONCE), strict=True):
                    _keep(answers, one, completion, tokenizer, adapter)
                alive()
    except (OSError, ValueError) as error:  # EngineGone is one; so is a model whose files are away
        log.warning("no more second answers for this window", answered=len(answers), error=str(error))
    return answers


def _request(one: Asked, adapter: str | None, *, candidate: bool) -> Generate:
    given = one.parameters
    temperature = float(given.get("temperature", 1.0))
    warmth = temperature if candidate else max(temperature, LEAST_TEMPERATURE)
    return Generate(
        id=f"second-{uuid4().hex}",
        prompt=one.prompt,
        sampling=logged_sampling(given, temperature=warmth, seed=int(given.get("seed", 0)) ^ (0 if candidate else 1)),
        adapter=adapter,
        namespace=one.namespace,
        cache_salt=one.namespace,
        priority="batch",
        grammar=logged_grammar(given),
        share="second answers",
        deadline_seconds=ANSWER_SECONDS,
        learn=False,
    )


def _keep(
    answers: dict[UUID, Second], one: Asked, completion: Completion, tokenizer: Tokenizer, adapter: str | None
) -> None:
    finished = completion.finished
    if finished.reason not in ("stop", "length") or finished.adapter != adapter:
        return
    stops = StopStrings(one.parameters.get("stop", ()))
    text = stops.push(tokenizer.decode(completion.token_ids)).text + stops.flush()
    answers[one.id] = Second(text, adapter, text.strip() != one.output.strip())
