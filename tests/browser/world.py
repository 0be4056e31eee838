"""A small world with something on every page, and the list of the pages, for walks through all of them."""

import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime

from playwright.sync_api import Page
from sqlalchemy import select
from sqlalchemy.orm import Session

from services.store import gold, reviews
from services.store.models import Artifact, Deployment, Example, Interaction, Project, ReviewItem, Revision, Run
from tests.browser import world_data, world_people
from tests.browser.scene import HERE, Scene
from tests.console import seed, seed_evaluation, seed_learning, seed_rollout, seed_runs, seed_speed

ANSWER = '{"people": ["Anna Reed", "Ivy Stone"], "places": ["Oslo"], "organisations": ["Northwind"], "dates": []}'
BETTER = '{"people": ["Anna Reed", "Ivy Stone"], "places": ["Oslo"], "organisations": [], "dates": ["2021-03-04"]}'
TEXT = "Anna Reed and Ivy Stone met in Oslo on 04 March 2021 to speak about the Northwind festival."
SCHEMA = '{"type": "object", "required": ["people", "places"], "properties": {"people": {"type": "array"}}}'


def build(session: Session) -> list[Scene]:
    """Fill an empty database and say what there is to see."""
    project = seed.lived_in(session, size=40)
    seed_speed.sped_up(session, project, size=200)
    young = seed.project(session, "young", "Young")
    session.add(seed_speed.answer(young, datetime.now(UTC), random.Random(1), speculation=None, rate=90.0))
    _queue(session)
    revision = session.scalars(select(Revision).order_by(Revision.id.desc())).first()
    assert revision is not None
    seed_runs.broken(session, project, revision)
    seed_runs.at_work(session, project, revision)
    gated = seed.project(session, "gated", "Gated entities")
    *_, promoted, refused = seed_evaluation.compared(session, gated)
    runs = list(session.scalars(select(Run.id).where(Run.project_id == project.id)))
    digest = session.scalars(select(Revision.digest).limit(1)).one()
    logged = session.scalars(select(ReviewItem.interaction_id).where(ReviewItem.project_id == project.id)).first()
    baseline = session.scalars(select(Interaction.id).where(~Interaction.speculated).limit(1)).one()
    return [
        Scene("home", "/"),
        Scene("overview", HERE),
        Scene("overview-young", "/p/young"),
        Scene("interactions", f"{HERE}/interactions"),
        Scene("interactions-none", f"{HERE}/interactions?q=nothing-like-it&mode=words"),
        Scene("interaction", f"{HERE}/interactions/{logged}"),
        Scene("interaction-baseline", f"{HERE}/interactions/{baseline}"),
        Scene("datasets", f"{HERE}/datasets"),
        Scene("revision", f"{HERE}/datasets/golden/{digest}"),
        Scene("runs", f"{HERE}/runs"),
        Scene("runs-none", f"{HERE}/runs?kind=kto&state=working"),
        Scene("run-triggers", f"{HERE}/runs/triggers"),
        Scene("run-new", f"{HERE}/runs/new?kind=sft"),
        Scene("run-new-wrong", f"{HERE}/runs/new?kind=dpo", _wrong_run),
        *(Scene(f"run-{place}", f"{HERE}/runs/{run}") for place, run in enumerate(runs)),
        Scene("evaluations", "/p/gated/evaluations"),
        Scene("evaluations-none", "/p/young/evaluations"),
        Scene("gate-settings", "/p/gated/evaluations/settings"),
        Scene("gate-settings-wrong", "/p/gated/evaluations/settings", _wrong_checks),
        Scene("evaluation", f"/p/gated/evaluations/{promoted.id}"),
        Scene("evaluation-refused", f"/p/gated/evaluations/{refused.id}?outcome=loss"),
        Scene("evaluation-override", f"/p/gated/evaluations/{refused.id}", _overriding),
        Scene("deployment", f"{HERE}/deployment"),
        Scene("deployment-young", "/p/young/deployment"),
        *_rollout(session),
        *_learning(session, project),
        *world_data.build(session, project),
        *REVIEW,
        *world_people.build(session, project),
    ]


def _wrong_run(page: Page) -> None:
    """The form sent with mistakes."""
    page.locator("#param-lr").fill("fast")
    page.locator(".more summary").click()
    page.locator("#param-rank").fill("9000")
    page.evaluate("document.querySelector('form.card button').disabled = false")
    page.locator("form.card button").click()
    page.locator("#wrong-rank").wait_for()


def _wrong_checks(page: Page) -> None:
    """The gate's form sent with mistakes."""
    page.get_by_label("Checks").fill('[{"name": "cites a policy"}]')
    page.get_by_label("Margin in points").fill("300")
    page.get_by_role("button", name="Save").click()
    page.locator("#wrong-checks").wait_for()


def _rollout(session: Session) -> list[Scene]:
    """A canary under way, one in the shadow, promotion frozen, and the dialog that one key opens."""
    made = [seed_rollout.on_trial(session), seed_rollout.in_the_shadow(session), seed_rollout.frozen(session)]
    path = f"/p/{made[0].slug}/deployment"
    return [
        *(Scene(f"deployment-{project.slug}", f"/p/{project.slug}/deployment") for project in made),
        Scene("runs-frozen", f"/p/{made[2].slug}/runs"),
        Scene("rollout-settings", f"{path}/settings"),
        Scene("deployment-one-key", path, lambda page: page.keyboard.press("r")),
    ]


def _learning(session: Session, project: Project) -> list[Scene]:
    """Lineage both ways, quality earned over several deployments, and who is told of it."""
    learned = seed_learning.experienced(session)
    webhook = seed_learning.told(session, project)[0]
    taught = session.scalars(
        select(Example.interaction_id).where(Example.project_id == project.id, Example.split == "train").limit(1)
    ).one()
    live = session.get_one(Deployment, project.id)
    rolled_back = session.scalars(
        select(Artifact.digest).where(Artifact.project_id == learned.id, Artifact.state == "rolled_back")
    ).one()
    return [
        Scene("overview-learned", "/p/learned"),
        Scene("deployment-learned", "/p/learned/deployment", lambda page: page.locator("summary").last.click()),
        Scene("lineage", f"{HERE}/interactions/{taught}/lineage"),
        Scene("artifact", f"{HERE}/artifacts/{live.active_digest}"),
        Scene("artifact-heads", f"{HERE}/artifacts/{live.speculator_digest}"),
        Scene("artifact-rolled-back", f"/p/learned/artifacts/{rolled_back}"),
        Scene("webhooks", f"{HERE}/webhooks"),
        Scene("webhooks-none", "/p/young/webhooks"),
        Scene("webhooks-once", "/p/learned/webhooks", _added),
        Scene("webhook", f"{HERE}/webhooks/{webhook.id}"),
        Scene("webhook-rotate", f"{HERE}/webhooks/{webhook.id}", _rotating),
    ]


def _added(page: Page) -> None:
    page.get_by_label("Address").fill("https://hook.example/in")
    page.get_by_role("button", name="Add the webhook").click()
    page.locator("[data-once-shown]").wait_for()


def _rotating(page: Page) -> None:
    page.get_by_role("button", name="Rotate secret").click()


# --- review -----------------------------------------------------------------------------------------------


def _queue(session: Session) -> None:
    """A project of its own with a single answer, a pair, a dispute, a decided and a gold item at the front."""
    project = seed.project(session, "review", "Newsroom entities")
    first, second, lead = (
        seed.person(session, f"{name}@example.org", role, project.id).user
        for name, role in (("mary", "reviewer"), ("alan", "reviewer"), ("radia", "lead"))
    )
    _judged(session, project, BETTER, [(first.id, "accept"), (second.id, "reject")], lead.id)
    _judged(session, project, ANSWER, [(first.id, "correct"), (second.id, "reject")], lead.id, hide=False)
    _judged(session, project, ANSWER, [(first.id, "accept"), (second.id, "correct")], None)
    messages = [{"role": "system", "content": seed.GUIDELINES * 3}, {"role": "user", "content": TEXT}]
    schema = {"grammar": {"kind": "json_schema", "text": SCHEMA}}
    for place in range(3):
        logged = seed.interaction(session, project.id, output=ANSWER, messages=messages, parameters=schema)
        pair = {"output": BETTER, "digest": None} if place == 2 else None
        seed.item(session, logged, priority=place, alternative=pair)


def _judged(
    session: Session,
    project: Project,
    output: str,
    said: list[tuple[uuid.UUID, str]],
    lead: uuid.UUID | None,
    *,
    hide: bool = True,
) -> None:
    messages = [{"role": "user", "content": TEXT}]
    logged = seed.interaction(session, project.id, output=output, messages=messages)
    item = seed.item(session, logged, overlap=len(said), split="train")
    for user, verdict in said:
        [held] = reviews.lease(session, project.id, user, 1)
        correction = BETTER if verdict == "correct" else None
        _say(session, held, user, verdict, correction=correction, comment="Northwind is an event", active_ms=7_200)
    if lead is not None:
        [held] = reviews.lease(session, project.id, lead, 1, queue="disputed")
        _say(session, held, lead, "accept", comment="The festival is an event, so it is no organisation.")
        if hide:
            gold.mark(session, item, lead)


def _say(session: Session, held: ReviewItem, user: uuid.UUID, verdict: str, **values: object) -> None:
    assert held.lease_token is not None
    judgement = reviews.Judgement(verdict, str(uuid.uuid4()), **values)  # type: ignore[arg-type]
    reviews.submit(session, held.project_id, held.id, user, held.lease_token, judgement)


FETCHED = """() => document.querySelector("[data-empty]").hidden
  || document.querySelector("[data-empty-text] h2").textContent !== "Fetching items" """


def _keys(*keys: str) -> Callable[[Page], None]:
    def press(page: Page) -> None:
        page.wait_for_function(FETCHED)
        page.wait_for_timeout(300)
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_timeout(100)

    return press


def _edited(page: Page) -> None:
    _keys("e")(page)
    page.locator("[data-editor]").fill(BETTER)
    page.keyboard.press("Escape")
    page.keyboard.press("3")


def _pair(page: Page) -> None:
    _keys("a", "Enter")(page)
    _keys("a", "Enter")(page)
    _keys("]")(page)
    page.locator("[data-reveal] a").wait_for()


def _overriding(page: Page) -> None:
    page.get_by_role("button", name="Override the gate").click()
    page.get_by_label("Why you know better").fill("The metric punishes the new date format that support asked for.")


REVIEW = [
    Scene("review", "/p/review/review", _keys()),
    Scene("review-edit", "/p/review/review", _edited),
    Scene("review-reject", "/p/review/review", _keys("x", "1", "3")),
    Scene("review-flag", "/p/review/review", _keys("s", "ArrowRight", "Shift+ArrowRight", "2", "s", "ArrowRight")),
    Scene("review-keys", "/p/review/review", _keys("?")),
    Scene("review-guidelines", "/p/review/review", _keys("g")),
    Scene("review-pair", "/p/review/review", _pair),
    Scene("review-history", "/p/review/review", _keys("ArrowLeft")),
    Scene("review-disputed", "/p/review/review?queue=disputed", _keys("]")),
    Scene("review-escalated", "/p/review/review?queue=escalated", _keys()),
    Scene("review-guide", "/p/review/review/guide"),
]
