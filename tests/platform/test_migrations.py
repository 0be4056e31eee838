"""The migration and the models say the same; it goes both ways; the triggers ring and refuse."""

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from migrations.run import configuration, downgrade, upgrade
from services.platform.postgres import PostgresServer
from services.store import partitions
from services.store.base import Base, Sessions, make_sessions, uuid7
from services.store.models import Job, Project, Run

# What Alembic's comparison passes over: CHECK constraints, index definitions, defaults, partitioning.
SCHEMA = text("""
    SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid::regclass::text = ANY(:tables)
    UNION ALL
    SELECT 'index', tablename, indexname, indexdef FROM pg_indexes WHERE tablename = ANY(:tables)
    UNION ALL
    SELECT 'column', table_name, column_name, concat_ws(' ', udt_name, is_nullable, column_default)
    FROM information_schema.columns WHERE table_name = ANY(:tables)
    UNION ALL
    SELECT 'partitioned', partrelid::regclass::text, '', pg_get_partkeydef(partrelid) FROM pg_partitioned_table
""")
COLUMNS = text("""
    SELECT table_name, string_agg(concat_ws(' ', column_name, udt_name, is_nullable, column_default), ', '
        ORDER BY column_name) FROM information_schema.columns WHERE table_name ~ '^interaction(_\\d{4}_\\d\\d)?$'
    GROUP BY table_name
""")


def test_models_and_migration_agree(database_url: str) -> None:
    engine = create_engine(database_url)
    with engine.connect() as connection:
        known = set(Base.metadata.tables)
        context = MigrationContext.configure(
            connection,
            opts={"include_name": lambda name, kind, _: kind != "table" or name in known, "compare_type": True},
        )
        differences = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert differences == []


def test_the_migrated_schema_is_the_models_to_the_letter(database_url: str, postgres: PostgresServer) -> None:
    url = postgres.create_database("test_from_models")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE EXTENSION vector"))
    Base.metadata.create_all(engine)
    try:
        assert schema(database_url) == schema(url)
    finally:
        engine.dispose()
        postgres.drop_database("test_from_models")


def schema(url: str) -> set[tuple[str, ...]]:
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(SCHEMA, {"tables": sorted(Base.metadata.tables)}).all()
    engine.dispose()
    assert len(rows) > 200
    return {tuple(row) for row in rows}


def test_downgrade_leaves_nothing_and_upgrade_comes_back(postgres: PostgresServer) -> None:
    url = postgres.create_database("test_both_ways")
    engine = create_engine(url)
    leftovers = text(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'S') "
        "UNION SELECT proname FROM pg_proc WHERE proname LIKE 'whet%'"
    )
    try:
        upgrade(url)
        downgrade(url, "base")
        with engine.connect() as connection:
            assert set(connection.scalars(leftovers)) == {"alembic_version"}
        upgrade(url)
        with engine.connect() as connection:
            assert set(Base.metadata.tables) <= set(connection.scalars(leftovers))
    finally:
        engine.dispose()
        postgres.drop_database("test_both_ways")


def test_new_projects_and_jobs_ring_their_bells(sessions: Sessions, database_url: str) -> None:
    job = Job(id=uuid7(), kind="train", payload={})
    with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as listener:
        listener.execute("LISTEN whet_snapshot; LISTEN whet_job")
        with sessions.begin() as session:
            session.add_all([Project(slug="support", name="Support"), job])
        rung = {(bell.channel, bell.payload) for bell in listener.notifies(timeout=5, stop_after=2)}
    assert rung == {("whet_snapshot", ""), ("whet_job", str(job.id))}


@pytest.mark.parametrize("table", ["annotation", "audit_event"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET id = id"])
def test_judgements_and_audit_rows_cannot_be_changed(sessions: Sessions, table: str, statement: str) -> None:
    with pytest.raises(IntegrityError, match=f"{table} is append-only"), sessions.begin() as session:
        session.execute(text(statement.format(table)))


def test_going_back_ends_the_speculators_run_and_keeps_the_adapters(postgres: PostgresServer) -> None:
    url = postgres.create_database("test_one_revision_back")
    engine = create_engine(url)
    try:
        upgrade(url)
        with Session(engine) as session, session.begin():
            project = Project(slug="support", name="Support")
            session.add(project)
            session.flush()
            for kind in ("sft", "speculator"):
                session.add(Run(project_id=project.id, kind=kind, params={}, created_by="me"))
        downgrade(url, "2026_11_21_initial")
        with engine.connect() as connection:
            states = {row.kind: row.state for row in connection.execute(text("SELECT kind, state FROM run"))}
        assert states == {"sft": "queued", "speculator": "cancelled"}
        upgrade(url)
    finally:
        engine.dispose()
        postgres.drop_database("test_one_revision_back")


def test_partitions_of_before_and_after_take_the_same_rows(postgres: PostgresServer) -> None:
    """A partition made before the migration gets the new columns; one made after it is attached like the others."""
    url = postgres.create_database("test_old_partitions")
    sessions = make_sessions(url)
    try:
        upgrade(url, "2026_11_21_initial")
        with sessions.begin() as session:
            partitions.ensure(session, 0)
        upgrade(url)
        with sessions.begin() as session:
            assert partitions.ensure(session, 40)
        with sessions() as session:
            columns = session.execute(COLUMNS).all()
    finally:
        sessions.kw["bind"].dispose()
        postgres.drop_database("test_old_partitions")
    assert len({name for name, _ in columns}) >= 3
    assert len({described for _, described in columns}) == 1


def test_answers_logged_before_the_search_index_are_found_after_it(postgres: PostgresServer) -> None:
    url = postgres.create_database("test_old_bodies")
    sessions = make_sessions(url)
    project, identity = uuid7(), uuid7()
    before = ScriptDirectory.from_config(configuration(url)).get_revision("2026_11_30_search").down_revision
    assert isinstance(before, str)
    try:
        upgrade(url, before)
        with sessions.begin() as session:
            partitions.ensure(session, 0)
            session.execute(OLD_INTERACTION, {"id": identity, "project": project})
            session.execute(OLD_BODY, {"id": identity})
        for _ in range(2):  # one that was cut short is run again
            upgrade(url, "2026_11_30_search")
            with sessions.begin() as session:
                found = session.execute(FOUND).all()
                session.execute(text("UPDATE alembic_version SET version_num = :before"), {"before": before})
            assert found == [(identity, project)]
        with sessions() as session:
            invalid = session.scalars(text("SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid")).all()
        assert invalid == []
    finally:
        sessions.kw["bind"].dispose()
        postgres.drop_database("test_old_bodies")


OLD_INTERACTION = text("""
    INSERT INTO interaction (id, project_id, origin, base_digest, generation, namespace, endpoint, stream,
        finish_reason, prompt_tokens, completion_tokens, cached_tokens, drafted_tokens, accepted_tokens, group_key,
        config_hash, started_at)
    VALUES (:id, :project, 'live', 'b', 1, 'n', '/v1/completions', false, 'stop', 1, 1, 0, 0, 0, 'g', 'c', now())
""")
OLD_BODY = text("""
    INSERT INTO interaction_body (id, messages, parameters, output, prompt_token_ids, token_ids, token_logprobs,
        prompt_hash, template_hash, tokenizer_hash, spool_version)
    VALUES (:id, '[]', '{}', 'an old needle', '[]', '[]', '[]', 'p', 't', 'k', 1)
""")
FOUND = text("SELECT id, project_id FROM interaction_body WHERE document @@ 'needle'::tsquery")
