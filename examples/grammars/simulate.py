"""The three applications by name, and the reviewer that the demo and the tests play."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from examples.grammars import chat, entities, match
from examples.grammars.common import Application, Message

APPLICATIONS: dict[str, Application] = {
    application.name: application for application in (match.APPLICATION, entities.APPLICATION, chat.APPLICATION)
}


class Review(NamedTuple):
    """A reviewer's decision; `correction` is set exactly when the verdict is "correct"."""

    verdict: Literal["accept", "correct"]
    correction: str | None


def review(app: str, messages: Sequence[Message], output: str) -> Review:
    """Accept what follows the house rules, correct everything else. Needs nothing but the logged prompt and output."""
    application = APPLICATIONS[app]
    if application.house_ok(messages, output):
        return Review("accept", None)
    return Review("correct", application.correct(messages, output))
