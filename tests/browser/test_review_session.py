"""Reviews in a real Chromium: by keyboard alone, over a broken connection, with two people at once."""

import re

from playwright.sync_api import Page, expect
from sqlalchemy import select

from services.store.base import Sessions
from services.store.models import Annotation, ReviewItem
from tests.browser.conftest import OpenAs
from tests.console import seed

HOSTILE = [
    "<script>alert('one')</script> plain",
    "<img src=x onerror=\"alert('two')\"> [link](javascript:alert(2))",
    "</div></textarea><svg/onload=alert('three')><style>body{display:none}</style>",
    "four {{constructor.constructor('alert(4)')()}}",
    "five \u202egnp.exe\u202c \u2028 end",
    "<iframe srcdoc='<script>parent.alert(6)</script>'></iframe> six",
]


def queue(sessions: Sessions, outputs: list[str], overlap: int = 1) -> None:
    with sessions.begin() as session:
        seed.queue(session, seed.project(session).id, outputs, overlap=overlap)


def stored(sessions: Sessions) -> list[Annotation]:
    with sessions() as session:
        return list(session.scalars(select(Annotation).order_by(Annotation.id)))


def shows(page: Page, output: str) -> None:
    """The response pane holds exactly this text, as text."""
    expect(page.locator("[data-response]")).to_have_text(output, use_inner_text=False)
    page.wait_for_timeout(260)  # nobody judges in less than the shortest look, and the page does not let them


def saved(page: Page) -> None:
    expect(page.locator("[data-save]")).to_have_text("Saved", timeout=10_000)


def test_a_whole_session_by_keyboard_alone(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, HOSTILE)
    page = open_as("ada@example.org", "/p/entities/review")
    keys = page.keyboard

    shows(page, HOSTILE[0])
    keys.press("a")
    keys.press("Enter")

    shows(page, HOSTILE[1])
    keys.press("e")
    editor = page.locator("[data-editor]")
    expect(editor).to_be_focused()
    keys.press("Control+End")
    keys.type(" and <b>more</b>")
    expect(page.locator("[data-diff] ins")).to_contain_text("more")
    keys.press("Escape")
    keys.press("3")
    keys.press("Control+Enter")

    shows(page, HOSTILE[2])
    keys.press("x")
    keys.press("c")
    keys.type("not even JSON")
    keys.press("Control+Enter")

    shows(page, HOSTILE[3])
    keys.press("k")
    keys.press("Enter")  # no reason yet: stays
    shows(page, HOSTILE[3])
    keys.press("1")
    keys.press("Enter")

    shows(page, HOSTILE[4])
    keys.press("f")
    keys.type("a lead should look")
    keys.press("Control+Enter")

    shows(page, HOSTILE[5])
    saved(page)
    keys.press("u")  # the escalation comes back, as it was
    shows(page, HOSTILE[4])
    expect(page.locator("[data-comment]")).to_have_value("a lead should look")
    keys.press("a")
    keys.press("Enter")
    shows(page, HOSTILE[5])
    keys.press("ArrowLeft")
    expect(page.locator("[data-past]")).to_contain_text("Accepted")
    keys.press("ArrowRight")
    keys.press("?")
    expect(page.locator("[data-help]")).to_be_visible()
    keys.press("Escape")
    keys.press("g")
    expect(page.locator("[data-drawer]")).to_contain_text("ISO form")
    keys.press("g")
    shows(page, HOSTILE[5])
    keys.press("a")
    keys.press("Enter")
    expect(page.locator("[data-empty]")).to_contain_text("All caught up")
    saved(page)

    rows = stored(sessions)
    assert [row.verdict for row in rows] == [
        "accept", "correct", "reject", "skip", "escalate", "undo", "accept", "accept",
    ]  # fmt: skip
    assert rows[1].correction == HOSTILE[1] + " and <b>more</b>"
    assert rows[1].tags == [seed.TAGS[2]]
    assert rows[2].comment == "not even JSON"
    assert rows[3].comment == "unclear"
    assert rows[5].supersedes == rows[4].id
    assert rows[6].review_item_id == rows[4].review_item_id
    assert all(row.active_ms is not None and row.active_ms < 60_000 for row in rows if row.verdict != "undo")
    with sessions() as session:
        states = session.scalars(select(ReviewItem.state).order_by(ReviewItem.priority)).all()
    assert states == ["done", "done", "done", "open", "done", "done"]


def test_the_queue_reason_is_hidden_until_the_judgement_is_stored(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    assert "uniform" not in page.content()
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    expect(page.locator("[data-reveal]")).to_contain_text("the uniform audit")


def test_a_draft_survives_a_reload(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    page.keyboard.press("e")
    page.keyboard.type(" more")
    page.keyboard.press("Escape")
    page.keyboard.press("c")
    page.keyboard.type("because")
    page.reload()
    expect(page.locator("[data-editor]")).to_have_value("one more")
    expect(page.locator("[data-comment]")).to_have_value("because")
    page.wait_for_timeout(260)
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-empty]")).to_be_visible()
    saved(page)
    [row] = stored(sessions)
    assert (row.correction, row.comment) == ("one more", "because")


def test_a_lost_connection_loses_no_judgement_and_doubles_none(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two", "three"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    page.context.set_offline(True)
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    shows(page, "two")  # prefetched
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    expect(page.locator("[data-save]")).to_have_text(re.compile("Offline: 2 kept here"))
    assert stored(sessions) == []
    page.context.set_offline(False)
    saved(page)
    assert [row.verdict for row in stored(sessions)] == ["accept", "reject"]


def test_an_answer_lost_on_the_way_back_is_not_stored_twice(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    lost: list[int] = []

    def lose_first(route: object) -> None:
        if lost:
            route.continue_()  # type: ignore[attr-defined]
        else:
            lost.append(route.fetch().status)  # type: ignore[attr-defined]
            route.abort()  # type: ignore[attr-defined]

    page.route("**/annotations", lose_first)
    page.keyboard.press("a")
    page.keyboard.press("Enter")
    shows(page, "two")
    saved(page)
    assert lost == [201]
    assert [row.verdict for row in stored(sessions)] == ["accept"]


def test_a_held_key_never_judges_an_item_nobody_saw(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two", "three"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    page.keyboard.press("a")
    for _ in range(20):  # the second and later ones arrive as repeats
        page.keyboard.down("Enter")
        page.keyboard.press("a")
    page.wait_for_timeout(400)
    page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    shows(page, "two")
    expect(page.locator("[data-done]")).to_have_text("1")
    assert len(stored(sessions)) == 1


def test_two_reviewers_work_side_by_side_on_different_items(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, [f"answer {n}" for n in range(7)])
    ada = open_as("ada@example.org", "/p/entities/review")
    shows(ada, "answer 0")  # five of the seven are hers now
    grace = open_as("grace@example.org", "/p/entities/review")
    shows(grace, "answer 5")
    for page in (ada, grace):
        page.keyboard.press("a")
        page.keyboard.press("Enter")
        saved(page)
    rows = stored(sessions)
    assert len({row.review_item_id for row in rows}) == len({row.author_id for row in rows}) == 2


def test_a_lead_resolves_what_was_escalated(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one"])
    ada = open_as("ada@example.org", "/p/entities/review")
    shows(ada, "one")
    ada.keyboard.press("f")
    ada.keyboard.type("which date is meant?")
    ada.keyboard.press("Control+Enter")
    saved(ada)
    lead = open_as("lea@example.org", "/p/entities/review?queue=escalated", "lead")
    shows(lead, "one")
    expect(lead.locator("[data-conversation]")).to_contain_text("which date is meant?")
    lead.keyboard.press("a")
    lead.keyboard.press("Enter")
    saved(lead)
    assert [row.verdict for row in stored(sessions)] == ["escalate", "accept"]
