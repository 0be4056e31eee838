"""Search: full-text index, embeddings, saved views, bulk actions.

Safe beside the running release. New columns are nullable and rewrite nothing; the trigger fills them for bodies that a
release without them lands. Bodies already there are given theirs a partition at a time, which locks nothing but those
rows, and the indexes of existing partitions are built concurrently: writers go on all the while. A migration that was
cut short can be run again. On a log of a million answers it takes some minutes.
"""

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import HALFVEC
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_search"
down_revision = "2026_11_30_people"
branch_labels = None
depends_on = None

# One document an answer: the texts of its prompt and the answer, the first 100,000 characters of them (a tsvector
# ends at 1 MB), and a word that names the project, so that the index answers for one project without reading what
# others wrote. That word only saves time: queries compare `project_id` as well.
DOCUMENT = r"""
CREATE OR REPLACE FUNCTION whet_document(project_id uuid, messages jsonb, output text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT to_tsvector('pg_catalog.simple'::regconfig, left(concat_ws(' ',
        output,
        (SELECT string_agg(said #>> '{}', ' ')
            FROM jsonb_path_query(messages, '$[*].content[*] ? (@.type() == "string")') AS said),
        (SELECT string_agg(said #>> '{}', ' ')
            FROM jsonb_path_query(messages, '$[*].content[*].text ? (@.type() == "string")') AS said)
    ), 100000)) || array_to_tsvector(ARRAY['project' || replace(coalesce(project_id::text, ''), '-', '')])
$$
"""
FILL = """
CREATE OR REPLACE FUNCTION whet_fill_body() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.project_id IS NULL THEN
        SELECT project_id INTO NEW.project_id FROM interaction WHERE id = NEW.id;
    END IF;
    NEW.document = whet_document(NEW.project_id, NEW.messages, NEW.output);
    RETURN NEW;
END $$
"""
FILL_TRIGGER = (
    "CREATE TRIGGER fill_body BEFORE INSERT OR UPDATE OF messages, output ON interaction_body "
    "FOR EACH ROW EXECUTE FUNCTION whet_fill_body()"
)
INDEXES = {
    "ix_interaction_body_document": ("interaction_body", "USING gin (document)"),
    "ix_interaction_end_user": (
        "interaction", "USING btree (project_id, end_user, id) WHERE end_user IS NOT NULL"
    ),
    "ix_interaction_session": (
        "interaction", "USING btree (project_id, session_key, id) WHERE session_key IS NOT NULL"
    ),
}  # fmt: skip
STRATEGIES = ("negative_feedback", "low_confidence", "schema_failure", "disagreement", "novelty", "uniform")


def upgrade() -> None:
    op.execute(DOCUMENT)
    op.execute(FILL)
    op.execute("ALTER TABLE interaction_body ADD COLUMN IF NOT EXISTS project_id uuid")
    op.execute("ALTER TABLE interaction_body ADD COLUMN IF NOT EXISTS document tsvector")
    # In the row while it fits: a search looks at many documents, and at nothing else of their rows.
    op.execute("ALTER TABLE interaction_body ALTER COLUMN document SET STORAGE main")
    op.execute("DROP TRIGGER IF EXISTS fill_body ON interaction_body")
    op.execute(FILL_TRIGGER)
    _strategies((*STRATEGIES, "chosen"))
    _tables()
    with op.get_context().autocommit_block():
        # Waiting for other transactions to end is what "concurrently" means; nobody queues behind that wait.
        op.execute("SET lock_timeout = 0")
        for name in _partitions("interaction_body"):
            op.execute(
                f"UPDATE {name} b SET project_id = i.project_id, "
                "document = whet_document(i.project_id, b.messages, b.output) "
                "FROM interaction i WHERE i.id = b.id AND b.document IS NULL"
            )
        for index, (table, definition) in INDEXES.items():
            op.execute(f"CREATE INDEX IF NOT EXISTS {index} ON ONLY {table} {definition}")
            for name in _partitions(table):
                _attach(index, name, definition)
        op.execute("SET lock_timeout = '5s'")


def _partitions(table: str) -> Iterator[str]:
    """Newest first: what people look for is recent."""
    rows = op.get_bind().scalars(
        sa.text(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = to_regclass(:table) ORDER BY 1 DESC"
        ),
        {"table": table},
    )
    yield from rows.all()


def _attach(index: str, partition: str, definition: str) -> None:
    """Build a partition's own index and make it part of the parent's; an invalid rest of an earlier try goes first."""
    own = f"{partition}_{index.removeprefix('ix_interaction_').removeprefix('body_')}_idx"
    attached = op.get_bind().scalar(
        sa.text(
            "SELECT count(*) FROM pg_inherits p JOIN pg_index i ON i.indexrelid = p.inhrelid "
            "WHERE p.inhparent = to_regclass(:index) AND i.indrelid = to_regclass(:partition)"
        ),
        {"index": index, "partition": partition},
    )
    if attached:
        return
    op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {own}")
    op.execute(f"CREATE INDEX CONCURRENTLY {own} ON {partition} {definition}")
    op.execute(f"ALTER INDEX {index} ATTACH PARTITION {own}")


def _strategies(allowed: tuple[str, ...]) -> None:
    """A short ACCESS EXCLUSIVE lock: the rows of the queue are read once."""
    listed = ", ".join(f"'{name}'" for name in allowed)
    op.execute("ALTER TABLE review_item DROP CONSTRAINT IF EXISTS ck_review_item_strategy")
    op.execute(f"ALTER TABLE review_item ADD CONSTRAINT ck_review_item_strategy CHECK (strategy IN ({listed}))")


def _tables() -> None:
    if sa.inspect(op.get_bind()).has_table("bulk_change"):
        return
    op.create_table(
        "interaction_embedding",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("vector", HALFVEC(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_interaction_embedding_project_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_interaction_embedding")),
    )
    # In the row while it fits a page: a scan that fetched every vector from beside the table would take ten times.
    op.execute("ALTER TABLE interaction_embedding ALTER COLUMN vector SET STORAGE main")
    op.create_index(op.f("ix_interaction_embedding_project_id_id"), "interaction_embedding", ["project_id", "id"])
    op.create_table(
        "saved_view",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("user_id", sa.UUID(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("query", sa.Text(), nullable=False),
        sa.Column("shared", sa.Boolean(), server_default="false", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_saved_view_project_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["user_id"], ["user_account.id"], name=op.f("fk_saved_view_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_saved_view")),
        sa.UniqueConstraint("project_id", "user_id", "name", name=op.f("uq_saved_view_project_id_user_id_name")),
    )
    op.create_table(
        "bulk_action",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("user_id", sa.UUID(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("params", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("selection", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("expected", sa.BigInteger(), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)
            for name in ("seen", "changed", "restored", "kept")
        ),
        sa.Column("place", sa.UUID(), nullable=True),
        sa.Column("job_id", sa.UUID(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("kind IN ('review', 'tag', 'withdraw')", name=op.f("ck_bulk_action_kind")),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'done', 'undoing', 'undone', 'failed')", name=op.f("ck_bulk_action_state")
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_bulk_action_project_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name=op.f("fk_bulk_action_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_bulk_action")),
    )
    op.create_index(op.f("ix_bulk_action_project_id_created_at"), "bulk_action", ["project_id", "created_at"])
    op.create_table(
        "bulk_change",
        sa.Column("action_id", sa.UUID(), nullable=False),
        sa.Column("interaction_id", sa.UUID(), nullable=False),
        sa.Column("before", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["action_id"], ["bulk_action.id"], name=op.f("fk_bulk_change_action_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("action_id", "interaction_id", name=op.f("pk_bulk_change")),
    )


def downgrade() -> None:
    """Answers sent to review by hand become part of the audit of an empty stratum: nothing is estimated from them."""
    for table in ("bulk_change", "bulk_action", "saved_view", "interaction_embedding"):
        op.drop_table(table)
    op.execute("UPDATE review_item SET strategy = 'uniform' WHERE strategy = 'chosen'")
    _strategies(STRATEGIES)
    for index in INDEXES:
        op.execute(f"DROP INDEX {index}")
    op.execute("DROP TRIGGER fill_body ON interaction_body")
    op.execute("DROP FUNCTION whet_fill_body")
    op.execute("ALTER TABLE interaction_body DROP COLUMN document")
    op.execute("ALTER TABLE interaction_body DROP COLUMN project_id")
    op.execute("DROP FUNCTION whet_document")
