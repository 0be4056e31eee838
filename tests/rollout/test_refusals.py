"""Refusals are known by their beginning, alike in Python and in the log's database."""

from sqlalchemy import text

from services.store.base import Sessions
from services.store.refusals import READ, REFUSAL, refuses

DECLINE = (
    "I'm sorry, but I can't help with that.",
    "I’m really sorry. We are unable to answer this.",
    "I'm sorry, Dave. I'm afraid I can't do that.",
    "Sorry, but that is against our rules.",
    "“I cannot answer.”",
    "Unfortunately, I am not able to share it.",
    "Unable to comply.",
    "As an AI, I have no view.",
    "as an ai",
)
HELP = (
    "I'm sorry to hear that your parcel is late. Your refund was sent today, but banks take three days.",
    "I'm sorry to hear that, but your refund is on its way.",
    "We are sorry. The charge was our error.",
    "I'm sorry for the delay. It ships today.",
    "You asked what we cannot do. " + "We " * 80 + "cannot help.",
    "",
)


def test_who_is_sorry_and_helps_refuses_nothing_and_the_log_is_asked_alike(sessions: Sessions) -> None:
    said = [*DECLINE, *HELP]
    with sessions() as session:
        asked = text("SELECT left(one, :read) ~* :refusal FROM unnest(cast(:said AS text[])) WITH ORDINALITY u(one, n) "
                     "ORDER BY n")  # fmt: skip
        logged = session.scalars(asked, {"read": READ, "refusal": REFUSAL, "said": said}).all()

    assert [refuses(one) for one in said] == [True] * len(DECLINE) + [False] * len(HELP)
    assert logged == [refuses(one) for one in said]
