"""Immediate effect and erasure: pins, vectors of corrections, tainted artefacts, what an erasure has done.

Safe beside the running release: new tables, and columns that are nullable or have a constant default, on tables of few
rows (ACCESS EXCLUSIVE for a moment, no rewrite). The annotation table stays append-only for everybody but an erasure,
which says so in its transaction (`whet.erasing`).
"""

import pgvector.sqlalchemy
import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_instant"
down_revision = "2026_11_30_review"
branch_labels = None
depends_on = None

JSONB = postgresql.JSONB(astext_type=sa.Text())
MOMENT = sa.DateTime(timezone=True)
REFUSE = """
    CREATE OR REPLACE FUNCTION whet_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        {exception}
        RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END $$
"""
ERASING = """
        IF TG_TABLE_NAME = 'annotation' AND TG_OP = 'UPDATE' AND current_setting('whet.erasing', true) = 'on' THEN
            RETURN NULL;
        END IF;
"""
BELL = "FOR EACH STATEMENT EXECUTE FUNCTION whet_ring_snapshot()"
ERASURE_COLUMNS = (
    lambda: sa.Column("kind", sa.Text(), server_default="end_user", nullable=False),
    lambda: sa.Column("asked_by", sa.Text(), server_default="", nullable=False),
    lambda: sa.Column("job_id", sa.UUID(), nullable=True),
    lambda: sa.Column("progress", JSONB, server_default=sa.text("'{}'"), nullable=False),
    lambda: sa.Column("spool_records", sa.BigInteger(), server_default="0", nullable=False),
    lambda: sa.Column("late_rows", sa.BigInteger(), server_default="0", nullable=False),
    lambda: sa.Column("spool_clean_at", MOMENT, nullable=True),
    lambda: sa.Column("forgotten_at", MOMENT, nullable=True),
)


def upgrade() -> None:
    op.create_table(
        "pin",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("messages", JSONB, nullable=False),
        sa.Column("parameters", JSONB, nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="live", nullable=False),
        sa.Column("interaction_id", sa.UUID(), nullable=False),
        sa.Column("review_item_id", sa.UUID(), nullable=False),
        sa.Column("annotation_ids", JSONB, nullable=False),
        sa.Column("approved_by", JSONB, nullable=False),
        sa.Column("hits", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("last_hit_at", MOMENT, nullable=True),
        sa.Column("learned_digest", sa.Text(), nullable=True),
        sa.Column("created_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.Column("withdrawn_at", MOMENT, nullable=True),
        sa.Column("withdrawn_by", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint("state IN ('live', 'learned', 'withdrawn')", name=op.f("ck_pin_state")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_pin_project_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pin")),
    )
    op.create_index(
        "uq_pin_current", "pin", ["project_id", "request_hash"], unique=True,
        postgresql_where=sa.text("state IN ('live', 'learned')"),
    )  # fmt: skip
    op.create_index(op.f("ix_pin_project_id_created_at"), "pin", ["project_id", "created_at"])
    op.create_index(op.f("ix_pin_review_item_id"), "pin", ["review_item_id"])
    op.create_index(op.f("ix_pin_interaction_id"), "pin", ["interaction_id"])
    op.create_table(
        "example_embedding",
        sa.Column("example_id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("base_digest", sa.Text(), nullable=False),
        sa.Column("shown", sa.Text(), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("embedding", pgvector.sqlalchemy.Vector(), nullable=False),
        sa.Column("created_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["example.id"], name=op.f("fk_example_embedding_example_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_example_embedding_project_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("example_id", name=op.f("pk_example_embedding")),
    )
    op.create_index(op.f("ix_example_embedding_project_id"), "example_embedding", ["project_id"])
    # Hits are counted without waking every gateway.
    op.execute(f"CREATE TRIGGER ring_snapshot AFTER INSERT OR UPDATE OF state OR DELETE OR TRUNCATE ON pin {BELL}")
    op.execute(f"CREATE TRIGGER ring_snapshot AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON example_embedding {BELL}")
    op.add_column("artifact", sa.Column("tainted_at", MOMENT, nullable=True))
    for column in ERASURE_COLUMNS:
        op.add_column("erasure_request", column())
    op.create_check_constraint(op.f("ck_erasure_request_kind"), "erasure_request", "kind IN ('end_user', 'session')")
    op.execute(REFUSE.format(exception=ERASING))


def downgrade() -> None:
    op.execute(REFUSE.format(exception=""))
    op.drop_constraint(op.f("ck_erasure_request_kind"), "erasure_request", type_="check")
    for column in reversed(ERASURE_COLUMNS):
        op.drop_column("erasure_request", column().name)
    op.drop_column("artifact", "tainted_at")
    op.drop_table("example_embedding")
    op.drop_table("pin")
