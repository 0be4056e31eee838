"""Whatever a model, a reviewer or a lead wrote: it is shown as text, whole, and nothing of it runs or loads."""

from collections import Counter
from itertools import islice, product

import pytest
from playwright.sync_api import Page, TimeoutError, expect
from sqlalchemy import select

from services.store.base import Sessions
from services.store.models import Annotation
from tests.browser.conftest import OpenAs
from tests.console import seed

RUNS = "window.ran=1"
PAYLOADS = [
    f"<script>{RUNS}</script>", f"<img src=x onerror='{RUNS}'>", f"<svg/onload={RUNS}>", f"[link](javascript:{RUNS})",
    f"<a href='javascript:{RUNS}'>a</a>", "<iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
    f"<math><mi//xlink:href='data:x,<script>{RUNS}</script>'>", f"<details open ontoggle={RUNS}>",
    "<style>@import 'http://127.0.0.1:9/x';*{background:url(http://127.0.0.1:9/y)}</style>",
    "<link rel=stylesheet href=//127.0.0.1:9/z>", "<meta http-equiv=refresh content='0;url=//127.0.0.1:9'>",
    f"<form action=//127.0.0.1:9><input autofocus onfocus={RUNS}></form>", f"<body onload={RUNS}>",
    f"{{{{constructor.constructor('{RUNS}')()}}}}", f"${{{RUNS}}}", "![i](http://127.0.0.1:9/i.png)",
    "\u202egnp.exe\u202c \u2066left\u2069", "a\u200bb\u200cc\u200dd\ufeffe\u00adf", "\u2028\u2029\u0085",
    "a\u0301" * 200,
]  # fmt: skip
WRAPPERS = [
    "{}", "</div></textarea></script>{}", '"\'>{}<!--', "<![CDATA[{}]]>", "<b><i>{}", '{{"json": "{}"}}', "`{}`",
    "<noscript><p title='</noscript>{}'>", "\u202e{}", "{}\n" * 30,
]  # fmt: skip
LONG = [f"{PAYLOADS[0]}{'x' * 1_000_000}", "<b>" * 330_000, "\u200b" * 400_000, "\u202ea" * 300_000]
HOSTILE = [*LONG, *(wrapper.replace("{}", one) for one, wrapper in islice(product(PAYLOADS, WRAPPERS), 196))]
# The page lets nobody judge within a quarter of a second; its clock runs fast here, so that 200 looks take seconds.
FAST_CLOCK = "const now = performance.now.bind(performance); performance.now = () => 40 * now();"


def hostile_queue(sessions: Sessions, outputs: list[str]) -> None:
    with sessions.begin() as session:
        project = seed.project(session)
        for place, output in enumerate(outputs):
            said = output[:20_000]
            messages = [{"role": said[:50], "content": said}, {"role": "system", "content": said}]
            logged = seed.interaction(session, project.id, output=output, messages=messages)
            seed.item(session, logged, priority=place, overlap=2 if place == 5 else 1)


SHOWN = 100_000  # characters of an answer until somebody asks for all
SHOWS = """text => { const shown = document.querySelector("[data-response]").textContent;
  return shown.length === text.length && [...text].every((one, at) => one === shown[at]
    || (at >= 500 && shown[at] === "\\ufffd")); }"""


def shown(page: Page, output: str) -> None:
    """Every character at its place; of many unseen ones the later are shown as \ufffd, of a megabyte the start."""
    try:
        page.wait_for_function(SHOWS, arg=output[:SHOWN], timeout=30_000)
    except TimeoutError:
        told = page.locator("[data-response]").evaluate(
            "area => [area.textContent.length, area.textContent.slice(0, 60)]"
        )
        toast = page.locator("[data-toasts]").inner_text()
        pytest.fail(f"{output[:60]!r} ({len(output)}) is not shown; {told!r} is, {toast!r}", pytrace=False)


def untouched(page: Page, url: str, asked: list[str]) -> None:
    assert page.evaluate("[window.ran ?? null, window.violations]") == [None, []]
    assert [one for one in asked if not one.startswith((url, "data:"))] == []


# Looks at each answer and judges it, all in the page: the way to Python and back, ten times for each of two hundred,
# took most of this test. Keys that a person presses are pressed in the tests of whole sessions.
JUDGE_ALL = """async (outputs) => {
  const shows = @SHOWS@;
  const rest = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const press = (key, more = {}) => {
    const at = document.activeElement ?? document.body;
    for (const name of ["keydown", "keyup"]) {
      at.dispatchEvent(new KeyboardEvent(name, { key, code: key, bubbles: true, cancelable: true, ...more }));
    }
  };
  const type = (more) => {
    const editor = document.querySelector("[data-editor]");
    editor.value += more;
    editor.dispatchEvent(new Event("input", { bubbles: true }));
  };
  for (const [place, text] of outputs.entries()) {
    for (let waited = 0; !shows(text); waited += 4) {
      if (waited > 20000) return place;
      await rest(4);
    }
    await rest(8);
    // Every tenth in the editor, and as a difference.
    if (place % 10 === 9) { press("e"); type("!"); press("Enter", { ctrlKey: true }); continue; }
    press(place % 7 === 0 ? "s" : "x");
    press(place % 7 === 0 ? "Enter" : "c");
    press("Escape");
    press("a");
    press("Enter");
  }
  return null;
}""".replace("@SHOWS@", SHOWS)


@pytest.mark.timeout(120)
def test_two_hundred_hostile_answers_are_shown_whole_and_do_nothing(
    sessions: Sessions, open_as: OpenAs, console_url: str
) -> None:
    assert len(set(HOSTILE)) == 200
    hostile_queue(sessions, HOSTILE)
    page = open_as("ada@example.org", "/")
    page.context.add_init_script(FAST_CLOCK)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto("/p/entities/review")
    stuck = page.evaluate(JUDGE_ALL, [output[:SHOWN] for output in HOSTILE])
    if stuck is not None:
        shown(page, HOSTILE[stuck])
    expect(page.locator("[data-empty]")).to_contain_text("All caught up")
    expect(page.locator("[data-save]")).to_have_text("Saved", timeout=10_000)
    expect(page.locator("[data-done]")).to_have_text("200")
    untouched(page, console_url, asked)
    with sessions() as session:
        verdicts = Counter(session.scalars(select(Annotation.verdict)))
    assert verdicts == {"accept": 180, "correct": 20}


def test_what_cannot_be_seen_is_marked_and_turns_nothing_else(sessions: Sessions, open_as: OpenAs) -> None:
    hostile_queue(sessions, ["pay \u202e001\u202c now\u200b"])
    page = open_as("ada@example.org", "/p/entities/review")
    shown(page, "pay \u202e001\u202c now\u200b")
    marks = page.locator("[data-response] .unseen")
    assert [mark.get_attribute("data-code") for mark in marks.all()] == ["202E", "202C", "200B"]
    box = "text => { const range = document.createRange(); const walk = document.createTreeWalker("
    box += "document.querySelector('[data-response]'), NodeFilter.SHOW_TEXT); while (walk.nextNode()) { const at = "
    box += "walk.currentNode.data.indexOf(text); if (at >= 0) { range.setStart(walk.currentNode, at); "
    box += "range.setEnd(walk.currentNode, at + 1); return range.getBoundingClientRect().left; } } }"
    assert page.evaluate(box, "0") < page.evaluate(box, "1")  # read from the left, in spite of the override


def test_hostile_words_of_reviewers_and_leads_do_nothing_either(
    sessions: Sessions, open_as: OpenAs, console_url: str
) -> None:
    evil = "".join(PAYLOADS[:16])
    with sessions.begin() as session:
        seed.project(session, guidelines=evil, tags=[PAYLOADS[0], PAYLOADS[1]])
        project = seed.project(session, "other", evil)
        [item] = seed.queue(session, project.id, [evil], overlap=2)
    page = open_as("lea@example.org", "/p/entities/review", "lead")
    page.keyboard.press("g")
    expect(page.locator("[data-drawer]")).to_contain_text(PAYLOADS[0])
    page.goto("/p/entities/review/guide")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for email, keys in (("ada@example.org", "a"), ("grace@example.org", "e")):
        other = open_as(email, "/p/other/review")
        shown(other, evil)
        other.wait_for_timeout(260)
        other.keyboard.press(keys)
        if keys == "e":
            other.keyboard.insert_text(evil)
        else:
            other.keyboard.press("c")
            other.keyboard.insert_text(evil)
        other.keyboard.press("Control+Enter")
        expect(other.locator("[data-save]")).to_have_text("Saved", timeout=10_000)
    page.goto("/p/other/review?queue=disputed")
    expect(page.locator("[data-dispute] .said")).to_have_count(2)
    page.wait_for_timeout(300)
    page.keyboard.press("]")
    page.keyboard.insert_text(evil)
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-save]")).to_have_text("Saved", timeout=10_000)
    page.goto("/p/other/review")
    page.keyboard.press("g")
    untouched(page, console_url, asked)
    assert item.id
