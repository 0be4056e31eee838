"""The admin API: projects, people, keys, runs, datasets, deployments, as JSON for the CLI and for engineers."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, FastAPI, Path, Query, Request

from services.admin import (
    artifact_api,
    dataset_api,
    erasure_api,
    evaluation_api,
    instant_api,
    people_api,
    review_api,
    rollout_api,
    settings_api,
    shapes,
    speculator_api,
    webhook_api,
)
from services.admin.access import Admin, Caller, Trainer, undeclared
from services.errors import Conflict, NotFound
from services.settings import Settings
from services.store import (
    audit,
    datasets,
    deployments,
    evaluations,
    jobs,
    keys,
    people,
    projects,
    revisions,
    roles,
    runs,
)
from services.store.models import ApiKey, Job, Run, UserAccount
from services.store.train_when import read_config

router = APIRouter(prefix="/api")
PARTS = (
    dataset_api.router, speculator_api.router, instant_api.router, people_api.router, review_api.router,
    erasure_api.router, erasure_api.spool_router, webhook_api.router, evaluation_api.router, rollout_api.router,
    artifact_api.router, settings_api.router,
)  # fmt: skip
Name = Annotated[str, Path(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


def add_admin(app: FastAPI) -> None:
    """The API's routes on an application whose state holds settings, sessions and pepper."""
    for part in (router, *PARTS):
        silent = undeclared(part.routes)
        if silent:
            raise RuntimeError(f"these routes do not say who may call them: {', '.join(silent)}")
        app.include_router(part)


# --- projects, people, keys -------------------------------------------------------------------------------


@router.get("/projects")
def list_projects(caller: Trainer) -> dict[str, Any]:
    """The projects this key reaches."""
    found = projects.list_all(caller.session)
    return {"projects": [shapes.project(row) for row in found if caller.key.project_id in (None, row.id)]}


@router.post("/projects", status_code=201)
def create_project(caller: Admin, sent: shapes.NewProject) -> dict[str, Any]:
    """A project that serves the base model; 409 when the slug is taken."""
    caller.everywhere()
    made = projects.create(caller.session, sent.slug, sent.name, config=sent.config)
    audit.record(caller.session, caller.actor, "project.create", f"project:{made.id}", {"slug": made.slug})
    return shapes.project(made)


@router.patch("/projects/{slug}")
def configure_project(caller: Admin, slug: str, sent: shapes.ProjectChanges) -> dict[str, Any]:
    """Change the configuration keys sent, null removes one; 400 naming a key that is unknown or out of range."""
    project = projects.configure(caller.session, caller.project(slug), sent.config)
    audit.record(caller.session, caller.actor, "project.configure", f"project:{project.id}", {"config": sent.config})
    return shapes.project(project)


@router.post("/users", status_code=201)
def invite(request: Request, caller: Admin, sent: shapes.NewUser) -> dict[str, Any]:
    """An account with a role and its one-time sign-in link. Sending it again gives a new link and sets the role."""
    if sent.project is None:
        caller.everywhere()
    project = caller.project(sent.project) if sent.project is not None else None
    known = people.known(caller.session, sent.email)
    if known is not None:
        caller.oversees(known.id)
    user = known or people.create_user(caller.session, email=sent.email, name=sent.name)
    roles.give(caller.session, caller.authority, user.id, sent.role, project.id if project else None)
    detail = {"role": sent.role, "project": sent.project}
    audit.record(caller.session, caller.actor, "user.invite", f"user:{user.id}", detail)
    link = _sign_in_url(request, caller, user)
    return {"id": str(user.id), "email": user.email, "role": sent.role, "sign_in_url": link}


@router.post("/users/link", status_code=201)
def new_link(request: Request, caller: Admin, sent: shapes.UserLink) -> dict[str, Any]:
    """Another sign-in link for somebody who has an account; roles stay as they are."""
    user = people.find_user(caller.session, sent.email)
    caller.oversees(user.id)
    audit.record(caller.session, caller.actor, "user.link", f"user:{user.id}")
    return {"id": str(user.id), "email": user.email, "sign_in_url": _sign_in_url(request, caller, user)}


def _sign_in_url(request: Request, caller: Caller, user: UserAccount) -> str:
    if user.disabled_at is not None:
        raise Conflict(f"the account {user.email} is disabled")
    settings: Settings = request.app.state.settings
    base = settings.public_console_url.rstrip("/") or str(request.base_url).rstrip("/")
    return f"{base}/sign-in/{people.make_sign_in_link(caller.session, user.id)}"


@router.get("/keys")
def list_keys(caller: Admin) -> dict[str, Any]:
    """Keys without their secrets, newest first."""
    return {"keys": [shapes.key(row) for row in keys.list_all(caller.session, caller.key.project_id)]}


@router.post("/keys", status_code=201)
def create_key(request: Request, caller: Admin, sent: shapes.NewKey) -> dict[str, Any]:
    """A key; its plaintext is in this answer and nowhere else."""
    if sent.project is None:
        caller.everywhere()
    project = caller.project(sent.project) if sent.project is not None else None
    made, plaintext = keys.create(
        caller.session,
        pepper=request.app.state.pepper,
        name=sent.name,
        scopes=sent.scopes,
        project_id=project.id if project else None,
        user_id=_acting(caller, sent, project.id if project else None),
    )
    detail = {"scopes": made.scopes, "project": sent.project}
    audit.record(caller.session, caller.actor, "key.create", f"key:{made.prefix}", detail)
    return {**shapes.key(made), "key": plaintext}


def _acting(caller: Caller, sent: shapes.NewKey, project_id: UUID | None) -> UUID | None:
    """Whom a key with the scope review judges as. It is that person, so what holds for sign-in links holds here."""
    if sent.acts_as is None:
        return None
    user = people.find_user(caller.session, sent.acts_as)
    caller.oversees(user.id)
    if people.rank(people.role_on(caller.session, user.id, project_id)) < people.rank("reviewer"):
        raise Conflict(f"{user.email} may not review there: give the role reviewer first")
    return user.id


@router.delete("/keys/{key_id}")
def revoke_key(caller: Admin, key_id: UUID) -> dict[str, Any]:
    """End a key now."""
    found = caller.session.get(ApiKey, key_id)
    if found is None or caller.key.project_id not in (None, found.project_id):
        raise NotFound(f"there is no API key {key_id}")
    revoked = keys.revoke(caller.session, key_id)
    audit.record(caller.session, caller.actor, "key.revoke", f"key:{revoked.prefix}")
    return shapes.key(revoked)


# --- runs -------------------------------------------------------------------------------------------------


@router.get("/p/{slug}/runs")
def list_runs(caller: Trainer, slug: str, limit: Annotated[int, Query(ge=1, le=200)] = 50) -> dict[str, Any]:
    """Newest first."""
    return {"runs": [shapes.run(row) for row in runs.list_(caller.session, caller.project(slug).id, limit=limit)]}


@router.post("/p/{slug}/runs", status_code=201)
def start_run(caller: Trainer, slug: str, sent: shapes.NewRun) -> dict[str, Any]:
    """Start a run; 409 while another of the project is unfinished, 400 naming a bad parameter."""
    project = caller.project(slug)
    run = runs.start(
        caller.session, project, params=sent.params, created_by=caller.actor, dataset=sent.dataset, kind=sent.kind
    )
    audit.record(caller.session, caller.actor, "run.start", f"run:{run.id}", {"project": slug})
    return shapes.run(run)


@router.get("/runs/{run_id}")
def show_run(caller: Trainer, run_id: UUID, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
    """A run with its evaluation and the events that came after event `after`."""
    run = _run(caller, run_id)
    events = runs.events(caller.session, run.id, after=after)
    return {
        **shapes.run(run),
        "evaluation": shapes.evaluation(evaluations.of_run(caller.session, run.id)),
        "events": [shapes.run_event(event) for event in events],
    }


@router.post("/runs/{run_id}/cancel")
def cancel_run(caller: Trainer, run_id: UUID) -> dict[str, Any]:
    """Ask a run to stop; 409 when it is over."""
    run = runs.request_cancel(caller.session, _run(caller, run_id).id)
    audit.record(caller.session, caller.actor, "run.cancel", f"run:{run.id}")
    return shapes.run(run)


@router.post("/runs/{run_id}/retry", status_code=201)
def retry_run(caller: Trainer, run_id: UUID) -> dict[str, Any]:
    """The same again, or on from what was trained; 409 unless it failed or was cancelled, while another is unfinished,
    and after three times."""
    run = runs.retry(caller.session, _run(caller, run_id), caller.actor)
    audit.record(caller.session, caller.actor, "run.retry", f"run:{run.id}", {"retry_of": str(run_id)})
    return shapes.run(run)


@router.get("/p/{slug}/triggers")
def show_triggers(caller: Trainer, slug: str) -> dict[str, Any]:
    """When runs of the project begin by themselves."""
    return read_config(caller.project(slug).config).model_dump(mode="json")


@router.put("/p/{slug}/triggers")
def set_triggers(caller: Trainer, slug: str, sent: dict[str, Any]) -> dict[str, Any]:
    """Change the keys sent, null sets one back; 400 naming one that is unknown or out of range."""
    project = caller.project(slug)
    made = projects.set_triggers(caller.session, project, sent)
    detail = {"config": {"train_when": sent}}
    audit.record(caller.session, caller.actor, "project.configure", f"project:{project.id}", detail)
    return made.model_dump(mode="json")


def _run(caller: Caller, run_id: UUID) -> Run:
    run = caller.session.get(Run, run_id)
    if run is None or caller.key.project_id not in (None, run.project_id):
        raise NotFound(f"there is no run {run_id}")
    return run


# --- deployments ------------------------------------------------------------------------------------------


@router.get("/p/{slug}/deployment")
def show_deployment(caller: Trainer, slug: str) -> dict[str, Any]:
    """What serves now and the history, newest first."""
    project = caller.project(slug)
    events = deployments.events(caller.session, project.id)
    return {
        **shapes.deployment(deployments.create(caller.session, project.id)),
        "events": [shapes.deployment_event(event) for event in events],
    }


# --- datasets and the queue -------------------------------------------------------------------------------


@router.get("/p/{slug}/datasets")
def list_datasets(caller: Trainer, slug: str) -> dict[str, Any]:
    """Names, and each one's newest revision."""
    found = datasets.list_(caller.session, caller.project(slug).id)
    newest = {row.name: revisions.latest(caller.session, row.id) for row in found}
    return {"datasets": [{"name": n, "latest": shapes.revision(row) if row else None} for n, row in newest.items()]}


@router.get("/p/{slug}/datasets/{name}")
def show_dataset(caller: Trainer, slug: str, name: Name) -> dict[str, Any]:
    """Revisions, newest first, and what the newest one holds."""
    dataset = datasets.get(caller.session, caller.project(slug).id, name)
    listed = revisions.list_(caller.session, dataset.id)
    return {
        "name": dataset.name,
        "revisions": [shapes.revision(row) for row in listed],
        "counts": revisions.counts(caller.session, listed[0].id) if listed else None,
    }


@router.post("/p/{slug}/datasets/{name}/build", status_code=202)
def build_dataset(caller: Trainer, slug: str, name: Name) -> dict[str, Any]:
    """Queue a build; 409 while one is queued or running."""
    project = caller.project(slug)
    payload = {"project_id": str(project.id), "dataset": name}
    dedupe_key = f"dataset.build:{project.id}:{name}"
    job = jobs.enqueue(caller.session, "dataset.build", payload, project_id=project.id, dedupe_key=dedupe_key)
    return shapes.job(job)


@router.post("/p/{slug}/sample", status_code=202)
def sample(caller: Trainer, slug: str) -> dict[str, Any]:
    """Queue a round of sampling into the review queue; 409 while one is queued or running."""
    project = caller.project(slug)
    payload = {"project_id": str(project.id)}
    dedupe_key = f"review.sample:{project.id}"
    job = jobs.enqueue(caller.session, "review.sample", payload, project_id=project.id, dedupe_key=dedupe_key)
    return shapes.job(job)


@router.get("/jobs/{job_id}")
def show_job(caller: Trainer, job_id: UUID) -> dict[str, Any]:
    """How a queued piece of work is getting on."""
    job = caller.session.get(Job, job_id)
    if job is None or caller.key.project_id not in (None, job.project_id):
        raise NotFound(f"there is no job {job_id}")
    return shapes.job(job)
