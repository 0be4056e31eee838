"""Erased means found nowhere: a marker is put everywhere somebody's words can go, and looked for in all of it."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pyarrow.parquet as pq
import pytest
from sqlalchemy import select, text

from services.errors import Conflict, InvalidRequest
from services.gateway.log_spool import LogSpool
from services.gateway.spool_format import Final
from services.store import audit, deployments, erasure, examples, jobs, revisions
from services.store.base import uuid7
from services.store.certificate import verified
from services.store.erasure_cover import hashed
from services.store.erasure_places import PLACES, Emptied, Gone
from services.store.models import (
    Annotation,
    ErasureRequest,
    Example,
    ExampleEmbedding,
    Interaction,
    InteractionBody,
    Pin,
    ReviewItem,
    Revision,
)
from tests.erasure.searching import columns, files_with, tables_with
from tests.erasure.seeding import MARK, OTHER, admitted, ask, erase, run_job, seed
from tests.gateway.parts import World, eventually

# Rows that go with their interaction and hold no text of it.
TEXTLESS = {"interaction_embedding", "shadow_answer"}


@pytest.fixture(scope="module")
def erased(world: World) -> ErasureRequest:
    """The marked user, erased. Before that the mark was in all the places it is looked for in."""
    seed(world)
    with world.sessions() as session:
        tables = {table for table, _ in tables_with(session, MARK)}
    wanted = {table for table, place in PLACES.items() if isinstance(place, Gone | Emptied)} - TEXTLESS
    assert tables >= wanted | {"job", "run"}
    kinds = {path.split("/")[0] for path in files_with(world.settings.home, MARK)}
    assert kinds >= {"spool", "exports", "runs"}
    return erase(world, erasure.checked(world.projects["entities"], "end_user", f"{MARK}-user"))


def test_the_erased_text_is_in_no_table_and_no_file(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        assert tables_with(session, MARK) == []
    assert files_with(world.settings.home, MARK) == []


def test_what_somebody_else_said_is_untouched(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        tables = {table for table, _ in tables_with(session, OTHER)}
        rows = session.scalars(select(Interaction).where(Interaction.end_user == f"{OTHER}-user")).all()
        examples = session.scalars(select(Example).where(~Example.content_hash.startswith("erased:"))).all()
        pins = session.scalars(select(Pin)).all()
    wanted = {table for table, place in PLACES.items() if isinstance(place, Gone | Emptied)} - TEXTLESS
    assert tables >= wanted
    assert len(rows) == len(examples) == len(pins) == 3
    assert "dataset_import" in tables
    assert files_with(world.settings.home, OTHER) != []


def test_a_correction_that_stood_in_anothers_prompt_is_no_longer_spelled_by_its_tokens(
    world: World, erased: ErasureRequest
) -> None:
    assert erased.certificate is not None
    assert erased.certificate["rows"]["prompts_that_showed_an_example"] == 1
    with world.sessions() as session:
        bodies = session.scalars(
            select(InteractionBody).join(Interaction, Interaction.id == InteractionBody.id)
            .where(Interaction.end_user == f"{OTHER}-user")
        ).all()  # fmt: skip
        assert [one.worked_examples for one in bodies] == [[], [], []]
        assert sorted(bool(one.prompt_token_ids) for one in bodies) == [False, True, True]


def test_exports_lose_the_rows_and_nothing_else(world: World, erased: ErasureRequest) -> None:
    folder = world.settings.home / "exports"
    for split, count in (("train", 2), ("held_out", 1)):
        lines = (folder / "golden" / f"{split}.jsonl").read_text().splitlines()
        packed = pq.read_table(folder / "golden" / f"{split}.parquet").to_pylist()
        assert len(lines) == len(packed) == count
        assert [json.loads(line)["example"] for line in lines] == [one["example"] for one in packed]
        assert all(OTHER in line for line in lines)
    manifest = json.loads((folder / "golden" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["erased"]) == ({"train": 2, "held_out": 1}, 3)
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [one["end_user"] for one in rows] == [f"{OTHER}-user"] * 3
    assert [len(json.loads(one["feedback"])) for one in rows] == [1] * 3
    assert erased.certificate is not None
    assert erased.certificate["exports_not_searched"] == ["packed.zip"]
    assert erased.certificate["rows"]["exported_rows"] == 12
    assert [one["what"] for one in erased.certificate["exports"]] == ["dataset.export", "interactions.export"]


def test_the_certificate_says_what_was_done_and_proves_that_it_is_whole(world: World, erased: ErasureRequest) -> None:
    found = erased.certificate
    assert found is not None
    assert verified(found)
    assert not verified(found | {"rows": {}})
    assert (found["rows"]["interaction"], found["rows"]["annotation"], found["rows"]["example"]) == (3, 4, 3)
    assert (found["rows"]["pin"], found["rows"]["example_embedding"], found["rows"]["feedback"]) == (3, 2, 3)
    assert found["spool_records"] > 0
    assert {one["digest"][0]: one["state"] for one in found["tainted"]} == {"a": "live", "b": "retired", "c": "staged"}
    assert found["subject"] == erased.subject == hashed(f"{MARK}-user")
    assert any("nothing here unlearns" in sentence for sentence in found["cannot_be_undone"])


def test_the_audit_log_tells_of_it_and_its_chain_is_whole(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        told = text("SELECT action FROM audit_event WHERE action LIKE 'erasure.%' ORDER BY id")
        actions = session.scalars(told).all()
        assert actions[:2] == ["erasure.request", "erasure.done"]
        assert audit.verify(session).intact


def test_judgements_stay_without_their_text_and_still_cannot_be_changed(world: World, erased: ErasureRequest) -> None:
    with world.sessions.begin() as session:
        rows = session.execute(
            select(Annotation, ReviewItem.state).join(ReviewItem, ReviewItem.id == Annotation.review_item_id)
        ).all()
        emptied = [annotation for annotation, state in rows if state == "withdrawn"]
        assert [(one.verdict, one.correction, one.comment) for one in emptied] == [("correct", None, None)] * 4
        with pytest.raises(Exception, match="append-only"), session.begin_nested():
            session.execute(text("UPDATE annotation SET comment = 'x'"))


def test_a_revision_is_rebuilt_without_the_rows_and_the_old_one_keeps_its_digest(
    world: World, erased: ErasureRequest
) -> None:
    assert erased.certificate is not None
    (rebuilt,) = erased.certificate["revisions"]
    with world.sessions() as session:
        newest, old = session.scalars(select(Revision).order_by(Revision.id.desc())).all()
        assert (rebuilt["from"], rebuilt["to"], rebuilt["examples_erased"]) == (old.digest, newest.digest, 3)
        assert examples.digest_of(revisions.manifest(session, old.id)) == old.digest
        assert examples.digest_of(revisions.manifest(session, newest.id)) == newest.digest
        assert {member.example.completion for member in revisions.members(session, newest.id)} & {None} == set()


def test_tainted_weights_serve_on_but_go_live_nowhere_again(world: World, erased: ErasureRequest) -> None:
    project_id = world.projects["entities"]
    with world.sessions() as session:
        deployment = deployments.get(session, project_id)
        assert deployment.active_digest == "a" * 64
        with pytest.raises(Conflict, match="erased since: train again"):
            deployments.flip(
                session, project_id, expected_generation=deployment.generation, digest="b" * 64, actor="me", reason="r"
            )
        session.rollback()
        assert deployments.get(session, project_id).last_good_digest is None, "it was b"
        assert deployments.roll_back(session, project_id, actor="me", reason="r").active_digest is None
        session.rollback()


def test_what_lands_late_is_erased_and_what_is_asked_later_is_kept(world: World, erased: ErasureRequest) -> None:
    late, fresh = uuid7(), f"new{uuid4().hex}"
    spool = LogSpool(world.settings.spool, budget_bytes=1 << 30)
    spool.admit(admitted(world, late, erased.created_at - timedelta(minutes=1)))
    spool.finish(Final(id=late, adapter_digest=None, finish_reason="stop", output=MARK))
    spool.close()
    kept = ask(world, fresh, MARK)
    eventually(lambda: not spool.directory.exists())
    with world.sessions() as session:
        assert session.get(Interaction, late) is None
        assert session.get(Interaction, kept) is not None
        assert erasure.get(session, erased.id).late_rows == 1


def test_an_answer_still_being_given_is_waited_for_and_erased_too(world: World, erased: ErasureRequest) -> None:
    mark = f"slow{uuid4().hex}"
    body = {"model": "entities", "messages": [{"role": "user", "content": f"\x05{mark}"}], "user": mark, "timeout": 3}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(world.post, "/v1/chat/completions", body)
        eventually(lambda: files_with(world.settings.home, mark))
        made = erase(world, erasure.checked(None, "end_user", mark))
        assert answer.result().status_code == 504
    assert files_with(world.settings.home, mark) == []
    with world.sessions() as session:
        assert tables_with(session, mark) == []
    assert made.spool_records > 0


def test_a_session_is_erased_and_not_the_user_of_the_same_name(world: World, erased: ErasureRequest) -> None:
    name = f"twin{uuid4().hex}"
    as_user = ask(world, "asuser", "x", user=name, whet={"session": "else"})
    as_session = ask(world, "assession", "x", user="else", whet={"session": name})
    erase(world, erasure.checked(None, "session", name))
    with world.sessions() as session:
        assert session.get(Interaction, as_user) is not None
        assert session.get(Interaction, as_session) is None


def test_the_same_erasure_is_not_begun_twice_and_a_failed_one_goes_on(world: World, erased: ErasureRequest) -> None:
    subject = erasure.checked(world.projects["other"], "end_user", "nobody")
    with world.sessions.begin() as session:
        made = erasure.request(session, subject, "me")
        with pytest.raises(Conflict, match="under way"):
            erasure.request(session, subject, "me")
        jobs.request_cancel(session, made.job_id or uuid4())
        assert erasure.settle(session) == [made.id]
        erasure.again(session, made)
    run_job(world, "erase")
    with world.sessions() as session:
        assert erasure.get(session, made.id).state == "done"


def test_nobody_is_no_subject() -> None:
    for kind, name in (("end_user", ""), ("session", "x" * 600), ("everybody", "x")):
        with pytest.raises(InvalidRequest):
            erasure.checked(None, kind, name)


def test_every_text_column_of_the_database_is_named_in_the_registry(world: World) -> None:
    """A new table or column fails here until somebody has decided what an erasure does about it."""
    with world.sessions() as session:
        missing = [place for place in columns(session) if not named(*place)]
        session.execute(text("CREATE TABLE diary (id uuid PRIMARY KEY, entry text)"))
        assert [place for place in columns(session) if not named(*place)] == [*missing, ("diary", "entry")]
        session.rollback()
    assert missing == []


def named(table: str, column: str) -> bool:
    place = PLACES.get(table)
    if isinstance(place, Emptied):
        return column in place.to or column in place.kept
    return place is not None


def test_a_vector_of_an_erased_correction_is_gone(world: World, erased: ErasureRequest) -> None:
    with world.sessions() as session:
        assert session.scalars(select(ExampleEmbedding.shown).where(ExampleEmbedding.shown.contains(MARK))).all() == []
        assert datetime.now(UTC) >= erased.created_at
