"""What a reviewer's day holds, in a real Chromium: twenty items, pairs, flags, disputes, own keys, cut connections."""

import re

from playwright.sync_api import Page, expect
from sqlalchemy import select, update

from services.store.base import Sessions
from services.store.models import Annotation, ReviewItem
from tests.browser.conftest import OpenAs
from tests.browser.test_review_session import queue, saved, shows, stored
from tests.console import seed

SCHEMA = '{"type": "object", "required": ["name"], "additionalProperties": false, "properties": {"name": {}}}'


def judge(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_twenty_items_by_keyboard_only(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        for place in range(20):
            alternative = {"output": f"other {place}", "digest": None} if place % 5 == 4 else None
            logged = seed.interaction(session, project.id, output=f"answer number {place} of twenty")
            seed.item(session, logged, priority=place, alternative=alternative)
    page = open_as("ada@example.org", "/p/entities/review")
    for place in range(20):
        if place % 5 == 4:
            expect(page.locator(".sides")).to_contain_text(f"other {place}")
            page.wait_for_timeout(260)
            judge(page, "]", "Enter")
            continue
        shows(page, f"answer number {place} of twenty")
        match place % 5:
            case 0:
                judge(page, "a", "Enter")
            case 1:
                judge(page, "e")
                page.keyboard.type(" items")
                judge(page, "Control+Enter")
            case 2:
                judge(page, "s", "ArrowRight", "Shift+ArrowRight", "2", "x", "1", "Enter")
            case _:
                judge(page, "k", "2", "Enter")
    expect(page.locator("[data-empty]")).to_contain_text("All caught up")
    saved(page)
    rows = stored(sessions)
    assert [row.verdict for row in rows] == ["accept", "correct", "reject", "skip", "prefer"] * 4
    assert {row.correction for row in rows[1::5]} == {f"answer number {n} of twenty items" for n in (1, 6, 11, 16)}
    assert rows[2].spans == [{"start": 7, "end": 15, "quote": "number 2", "tag": seed.TAGS[1]}]
    assert all(row.preference in ("response", "alternative") for row in rows[4::5])
    for _ in range(20):
        page.keyboard.press("u")
        page.wait_for_timeout(60)
    expect(page.locator("[data-done]")).to_have_text("0")
    shows(page, "answer number 0 of twenty")
    with sessions() as session:
        assert set(session.scalars(select(ReviewItem.state))) == {"open"}
    assert len(stored(sessions)) == 40


def test_two_browsers_meet_on_an_item_only_when_overlap_asks(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, [f"single {n}" for n in range(4)])
    with sessions.begin() as session:
        project = session.scalars(select(ReviewItem.project_id)).first()
        assert project is not None
        for place in range(3):
            seed.item(session, seed.interaction(session, project, output=f"double {place}"), overlap=2, priority=9)
    pages = [open_as(f"{name}@example.org", "/p/entities/review") for name in ("ada", "grace")]
    seen: list[list[str]] = [[], []]
    for _ in range(20):
        for page, mine in zip(pages, seen, strict=True):
            if page.locator("[data-response]").is_visible():
                page.wait_for_timeout(260)
                mine.append(page.locator("[data-response]").inner_text())
                judge(page, "a", "Enter")
                saved(page)
            else:
                page.reload()
                page.wait_for_timeout(150)
        if len(seen[0]) + len(seen[1]) == 10:
            break
    assert sorted(seen[0] + seen[1]) == [f"double {n // 2}" for n in range(6)] + [f"single {n}" for n in range(4)]
    assert all(len(mine) == len(set(mine)) for mine in seen)
    with sessions() as session:
        rows = session.execute(select(ReviewItem.overlap_target, ReviewItem.judged, ReviewItem.state)).all()
    assert {(target == judged, state) for target, judged, state in rows} == {(True, "done")}


def test_a_connection_cut_in_the_middle_of_an_edit_loses_nothing(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    judge(page, "e")
    page.keyboard.type(" more")
    page.context.set_offline(True)
    page.keyboard.type(" and more")
    judge(page, "Control+Enter")
    shows(page, "two")
    judge(page, "e")
    page.keyboard.type(" too")
    expect(page.locator("[data-save]")).to_have_text(re.compile("Offline: 1 kept here"))
    page.context.set_offline(False)
    expect(page.locator("[data-done]")).to_have_text("1", timeout=10_000)
    expect(page.locator("[data-editor]")).to_have_value("two too")
    judge(page, "Control+Enter")
    saved(page)
    assert [row.correction for row in stored(sessions)] == ["one more and more", "two too"]


def test_a_reload_keeps_flags_and_what_was_judged_can_still_be_undone(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two \U0001f600 flags"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    judge(page, "a", "Enter")
    shows(page, "two \U0001f600 flags")
    saved(page)
    judge(page, "s", "ArrowRight", "1")
    expect(page.locator("mark")).to_have_text("flags")
    page.reload()
    expect(page.locator("mark")).to_have_attribute("data-tag", seed.TAGS[0])
    page.wait_for_timeout(260)
    judge(page, "ArrowLeft")
    expect(page.locator("[data-past]")).to_contain_text("Accepted")
    judge(page, "ArrowRight", "x")
    page.wait_for_timeout(260)
    judge(page, "Enter")
    saved(page)
    assert stored(sessions)[1].spans == [{"start": 6, "end": 11, "quote": "flags", "tag": seed.TAGS[0]}]
    judge(page, "u")
    expect(page.locator("mark")).to_have_text("flags")
    judge(page, "u")
    shows(page, "one")


def test_a_mouse_selection_is_flagged_as_selected(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["alpha beta gamma"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "alpha beta gamma")
    page.locator("[data-response]").dblclick(position={"x": 60, "y": 12})
    judge(page, "s")
    expect(page.locator("mark.pending")).to_have_text("beta")
    judge(page, "Enter")
    expect(page.locator("[data-flags] q")).to_have_text("beta")
    page.get_by_role("button", name="Remove this flag").click()
    expect(page.locator("mark")).to_have_count(0)


def test_keys_are_changed_in_the_sheet_and_stay_changed(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one", "two"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    judge(page, "?")
    page.get_by_role("button", name="Change the key for: accept").press("Enter")
    judge(page, "x")
    expect(page.locator("[data-keys-note]")).to_have_text("x was reject, which is now a.")
    judge(page, "Escape")
    page.wait_for_timeout(100)
    page.reload()
    shows(page, "one")
    expect(page.locator(".choice.reject kbd")).to_have_text("a")
    judge(page, "x", "Enter")
    saved(page)
    assert [row.verdict for row in stored(sessions)] == ["accept"]


def test_an_edit_that_leaves_the_schema_is_said_at_once(sessions: Sessions, open_as: OpenAs) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        wanted = {"grammar": {"kind": "json_schema", "text": SCHEMA}}
        seed.item(session, seed.interaction(session, project.id, output='{"name": 1}', parameters=wanted))
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, '{"name": 1}')
    check = page.locator("[data-check]")
    expect(check).to_have_text("Follows its schema")
    judge(page, "e")
    for text, said in (
        ('{"nam": 1}', "has no name; the answer may have no nam"),
        ("{", "no valid JSON"),
        ("[]", "array"),
    ):
        page.locator("[data-editor]").fill(text)
        expect(check).to_contain_text(said)
    page.locator("[data-editor]").fill('{"name": 2}')
    expect(check).to_have_text("Follows its schema")
    expect(page.locator("[data-change-share]")).to_contain_text("% changed")


def test_a_lead_settles_a_dispute_with_one_key_and_a_word(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one"], overlap=2)
    for name, keys in (("ada", ("a", "Enter")), ("grace", ("e", "2", "Control+Enter"))):
        page = open_as(f"{name}@example.org", "/p/entities/review")
        shows(page, "one")
        judge(page, *keys)
        saved(page)
    lead = open_as("lea@example.org", "/p/entities/review?queue=disputed", "lead")
    shows(lead, "one")
    expect(lead.locator("[data-dispute] ins")).to_have_text("one2")
    judge(lead, "]", "Control+Enter")
    expect(lead.locator(".toast")).to_contain_text("why you decide so")
    lead.keyboard.type("a two is missing")
    judge(lead, "Control+Enter")
    lead.get_by_role("button", name="Check reviewers by it").click()
    expect(lead.locator(".toast").last).to_contain_text("will be checked by it")
    last = stored(sessions)[-1]
    assert (last.correction, last.comment, last.adjudicates) == ("one2", "a two is missing", True)
    with sessions() as session:
        assert session.scalars(select(ReviewItem.gold)).one() is not None


def test_sides_of_a_pair_stay_where_they_were_after_a_reload(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["served"])
    with sessions.begin() as session:
        session.execute(update(ReviewItem).values(alternative={"output": "other", "digest": None}))
    page = open_as("ada@example.org", "/p/entities/review")
    expect(page.locator("[data-side-left]")).not_to_have_text("")
    left = page.locator("[data-side-left]").inner_text()
    page.reload()
    expect(page.locator("[data-side-left]")).to_have_text(left)
    page.wait_for_timeout(260)
    judge(page, "e", "a", "Enter")  # neither belongs to a pair
    expect(page.locator(".toast")).to_contain_text("Choose a side first")
    judge(page, "[", "Enter")
    saved(page)
    with sessions() as session:
        preference = session.scalars(select(Annotation.preference)).one()
    assert preference == {"served": "response", "other": "alternative"}[left]


def test_what_differs_in_a_pair_is_marked_when_asked(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["the red fox sleeps"])
    with sessions.begin() as session:
        session.execute(update(ReviewItem).values(alternative={"output": "the grey fox sleeps well", "digest": None}))
    page = open_as("ada@example.org", "/p/entities/review")
    expect(page.locator("[data-side-left]")).to_contain_text("fox")
    expect(page.locator("mark.own")).to_have_count(0)
    judge(page, "d")
    assert sorted(" ".join(page.locator("mark.own").all_inner_texts()).split()) == ["grey", "red", "well"]
    judge(page, "d")
    expect(page.locator("mark.own")).to_have_count(0)


def test_the_submit_button_names_the_key_that_submits_now(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one"])
    page = open_as("ada@example.org", "/p/entities/review")
    shows(page, "one")
    button = page.locator("[data-submit] kbd:visible")
    expect(button).to_have_text("Enter")
    judge(page, "e")
    expect(button).to_have_text("Ctrl Enter")
    expect(page.locator("[data-editor-hint]")).to_be_visible()
    judge(page, "Escape")
    expect(button).to_have_text("Enter")


def test_the_only_lead_is_told_before_and_after_deciding_what_they_judged(sessions: Sessions, open_as: OpenAs) -> None:
    queue(sessions, ["one"], overlap=2)
    lead = open_as("lea@example.org", "/p/entities/review", "lead")
    shows(lead, "one")
    judge(lead, "a", "Enter")
    saved(lead)
    ada = open_as("ada@example.org", "/p/entities/review")
    shows(ada, "one")
    judge(ada, "x", "Enter")
    saved(ada)
    lead.goto("/p/entities/review?queue=disputed")
    shows(lead, "one")
    expect(lead.locator("[data-told]")).to_contain_text("You have spoken of this one before")
    expect(lead.locator("[data-dispute] h3").first).to_have_text("You accepted it")
    judge(lead, "]", "Control+Enter")
    expect(lead.locator(".toast")).to_contain_text("why you decide so")
    lead.keyboard.type("it is wrong after all")
    judge(lead, "Control+Enter")
    expect(lead.locator("[data-reveal]")).to_contain_text("as the only lead: noted")
    expect(lead.get_by_role("button", name="Check reviewers by it")).to_have_count(0)
    last = stored(sessions)[-1]
    assert (last.verdict, last.adjudicates, last.again) == ("reject", True, True)
    lead.goto(f"/p/entities/interactions/{last.interaction_id}")
    expect(lead.get_by_text("decision of a judge")).to_be_visible()
