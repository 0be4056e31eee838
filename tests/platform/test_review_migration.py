"""Judgements from before the review migration are counted, their disputes found, and the way back keeps them all."""

import uuid

from sqlalchemy import Connection, create_engine, text

from migrations.run import downgrade, upgrade
from services.platform.postgres import PostgresServer
from services.store.base import uuid7

BEFORE = "2026_11_22_speculation"
ITEM = text("""
    INSERT INTO review_item (id, project_id, interaction_id, strategy, "window", stratum_size, priority, order_hash,
        split, group_key, overlap_target, state)
    VALUES (:id, :project, :interaction, 'uniform', 'w', 1, 0, 'h', 'held_out', 'g', 2, 'done')
""")
JUDGEMENT = text("""
    INSERT INTO annotation (id, project_id, review_item_id, interaction_id, author_id, idempotency_key, verdict,
        correction, tags, spans, assisted)
    VALUES (:id, :project, :item, :interaction, :author, :key, :verdict, :correction, '{}', '[]', false)
""")


def item(connection: Connection, project: uuid.UUID, said: dict[uuid.UUID, tuple[str, str | None]]) -> uuid.UUID:
    made, interaction = uuid7(), uuid7()
    connection.execute(ITEM, {"id": made, "project": project, "interaction": interaction})
    for author, (verdict, correction) in said.items():
        connection.execute(
            JUDGEMENT,
            {"id": uuid7(), "project": project, "item": made, "interaction": interaction, "author": author,
             "key": str(uuid7()), "verdict": verdict, "correction": correction},
        )  # fmt: skip
    return made


def test_old_judgements_are_counted_and_the_way_back_keeps_them(postgres: PostgresServer) -> None:
    url = postgres.create_database("test_review_migration")
    engine = create_engine(url)
    try:
        upgrade(url, BEFORE)
        ada, grace, alan, project = (uuid7() for _ in range(4))
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO project (id, slug, name) VALUES (:id, 'p', 'P')"), {"id": project})
            for user in (ada, grace, alan):
                row = {"id": user, "email": f"{user}@example.org"}
                connection.execute(text("INSERT INTO user_account (id, email, name) VALUES (:id, :email, 'N')"), row)
            agreed = item(connection, project, {ada: ("correct", "two \n"), grace: ("correct", "two")})
            disputed = item(connection, project, {ada: ("correct", "two"), grace: ("correct", "three")})
            quarrel = item(connection, project, {ada: ("accept", None), grace: ("reject", None)})
        upgrade(url)
        with engine.begin() as connection:
            rows = connection.execute(text("SELECT id, state, judged FROM review_item"))
            assert {row.id: (row.state, row.judged) for row in rows} == {
                agreed: ("done", 2), disputed: ("disputed", 2), quarrel: ("disputed", 2),
            }  # fmt: skip
            insert = "INSERT INTO annotation (id, project_id, review_item_id, interaction_id, author_id, "
            insert += "idempotency_key, verdict, tags, spans, assisted, checked) SELECT gen_random_uuid(), project_id, "
            insert += "id, interaction_id, :author, 'key', 'accept', '{}', '[]', false, true FROM review_item "
            connection.execute(text(insert + "WHERE id = :item"), {"author": alan, "item": agreed})
        downgrade(url, BEFORE)
        with engine.begin() as connection:
            undone = text("SELECT count(*) FROM annotation WHERE verdict = 'undo' AND author_id = :alan")
            assert connection.scalar(undone, {"alan": alan}) == 1
            assert connection.scalar(text("SELECT count(*) FROM annotation")) == 8
            assert set(connection.scalars(text("SELECT state FROM review_item"))) == {"done"}
        upgrade(url)
        with engine.begin() as connection:
            assert connection.scalar(text("SELECT sum(judged) FROM review_item")) == 6
    finally:
        engine.dispose()
        postgres.drop_database("test_review_migration")
