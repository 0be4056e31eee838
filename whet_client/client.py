"""The `whet` client: what the `openai` one has no word for. Feedback on answers, reviewing, and the log.

from whet_client.client import Whet

with Whet("wh_…", project="chat") as whet:
    whet.feedback(answer.id, rating=-1, correction="…")
"""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from whet_client.transport import Transport
from whet_client.types import Annotation, Feedback, Interaction, Item, Line, Said, Side, Undone, Verdict, read

GATEWAY_URL = "http://127.0.0.1:8000"
CONSOLE_URL = "http://127.0.0.1:8001"
PAGE = 100


class Whet:
    """A connection to the platform for one project. Not for several threads at once.

    Feedback takes a key with the scope `feedback`, everything else one with `review`. Failures are
    `whet_client.errors.WhetError`; calls are repeated when the platform is busy or away, and stored once all the same.
    """

    def __init__(
        self,
        api_key: str,
        *,
        project: str,
        gateway_url: str = GATEWAY_URL,
        console_url: str = CONSOLE_URL,
        timeout: float = 30.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`timeout` is in seconds for each try. `transport` replaces the network, for tests of your own.

        Raises ValueError for what cannot be a key.
        """
        if not api_key.strip() or not api_key.isascii():
            raise ValueError("api_key is empty or no API key; one looks like wh_…")
        self.project = project
        self._gateway = Transport(gateway_url, api_key, timeout=timeout, retries=retries, transport=transport)
        self._console = Transport(console_url, api_key, timeout=timeout, retries=retries, transport=transport)

    def __enter__(self) -> "Whet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._gateway.close()
        self._console.close()

    # --- feedback -----------------------------------------------------------------------------------------

    def feedback(
        self,
        interaction_id: str,
        *,
        rating: int | None = None,
        score: float | None = None,
        comment: str | None = None,
        correction: str | None = None,
        user: str | None = None,
        idempotency_key: str | None = None,
    ) -> Feedback:
        """Say what an answer was worth. `interaction_id` is the id of an `openai` answer, or its
        `x-whet-interaction-id`; `rating` is -1, 0 or 1. Give an idempotency key of your own to say a thing once across
        restarts of your app."""
        said = {"rating": rating, "score": score, "comment": comment, "correction": correction, "user": user}
        body = {"interaction_id": interaction_id, "model": self.project} | _given(said)
        key = idempotency_key or str(uuid.uuid4())
        return read(Feedback, self._gateway.send("POST", "/v1/feedback", body, idempotency_key=key))

    # --- the log ------------------------------------------------------------------------------------------

    def interactions(
        self,
        *,
        words: str = "",
        finish: str = "",
        feedback: str = "",
        window: str = "all",
        user: str = "",
        session: str = "",
        tag: str = "",
    ) -> Iterator[Line]:
        """The project's interactions, newest first; pages are fetched as they are needed.

        `finish` is stop, length, cancelled or error; `feedback` is negative, positive, any or none; `window` is hour,
        day, week, month or all; `user` and `session` as the app sent them; `tag` is a name, or name=value.
        """
        chosen = {"q": words, "finish": finish, "feedback": feedback, "window": window}
        wanted = chosen | {"user": user, "session": session, "tag": tag, "limit": PAGE}
        before: dict[str, str] = {}
        while True:
            rows = self._review("GET", "interactions", parameters=wanted | before)["interactions"]
            yield from (read(Line, row) for row in rows)
            if len(rows) < PAGE:
                return
            before = {"before": rows[-1]["id"]}

    def interaction(self, interaction_id: str) -> Interaction:
        """One of them in full, with the feedback it got."""
        found = self._review("GET", f"interactions/{_part(_bare(interaction_id))}")
        return read(Interaction, found | {"feedback": [read(Said, one) for one in found["feedback"]]})

    # --- reviewing ----------------------------------------------------------------------------------------

    def lease(self, count: int = 5) -> list[Item]:
        """Hold up to `count` items (20 at most), those held already included. Fewer when the queue has no more."""
        return [read(Item, row) for row in self._review("POST", "review/lease", {"count": count})["items"]]

    def annotate(
        self,
        item: Item,
        verdict: Verdict,
        *,
        correction: str | None = None,
        preference: Side | None = None,
        tags: Sequence[str] = (),
        comment: str | None = None,
        active_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> Annotation:
        """Judge an item you hold: a pair by `prefer` and a `preference`, or by `reject` when neither will do. Raises
        LostLease when it went to somebody else meanwhile."""
        said = {
            "correction": correction, "preference": preference, "comment": comment, "active_ms": active_ms,
            "tags": list(tags),
        }  # fmt: skip
        body = {
            "verdict": verdict, "lease_token": item.lease_token,
            "idempotency_key": idempotency_key or str(uuid.uuid4()),
        } | _given(said)  # fmt: skip
        return read(Annotation, self._review("POST", f"review/items/{_part(item.id)}/annotations", body))

    def undo(self, annotation: Annotation | str) -> Undone:
        """Take a judgement of yours back."""
        identity = annotation.id if isinstance(annotation, Annotation) else annotation
        return read(Undone, self._review("POST", "review/undo", {"annotation_id": identity}))

    def heartbeat(self, item: Item) -> str:
        """Hold an item for three more minutes; returns until when."""
        path = f"review/items/{_part(item.id)}/heartbeat"
        return str(self._review("POST", path, {"lease_token": item.lease_token})["lease_expires_at"])

    def release(self, item: Item) -> None:
        """Give an item back unjudged."""
        self._review("POST", f"review/items/{_part(item.id)}/release", {"lease_token": item.lease_token})

    def _review(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        return self._console.send(method, f"/api/p/{_part(self.project)}/{path}", body, parameters)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _part(text: str) -> str:
    """One part of a path: an id that came from elsewhere must not lead anywhere else."""
    return quote(text, safe="").replace(".", "%2E")


def _bare(interaction_id: str) -> str:
    """An `openai` answer's id is the interaction's with a prefix."""
    return interaction_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
