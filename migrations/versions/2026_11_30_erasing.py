"""Erasure on several machines and beside running jobs: which spools there are, which are clean, what was taken out.
And revisions that the database itself keeps as they were made.

Safe beside the running release: three new tables, which it neither reads nor writes. Its shipper registers no spool;
an erasure that is under way while releases change waits until the new one does. The triggers take a SHARE ROW EXCLUSIVE
lock for a moment each, and refuse only what no release does.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_erasing"
down_revision = "2026_11_30_counts"
branch_labels = None
depends_on = None

# Of a revision only the count of looks and the report's quotations change after it is made; of its members nothing.
FROZEN = {
    "revision": "id, dataset_id, digest, parent_digest, train_count, held_out_count, held_out_digest, created_at",
    "revision_example": "revision_id, position, example_id, content_hash, split, weight",
}
MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "log_spool",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("seen_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_log_spool")),
    )
    op.create_table(
        "erasure_spool",
        sa.Column("request_id", sa.UUID(), nullable=False),
        sa.Column("spool_id", sa.UUID(), nullable=False),
        sa.Column("records", sa.BigInteger(), nullable=False),
        sa.Column("clean_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        _of_request("erasure_spool"),
        sa.PrimaryKeyConstraint("request_id", "spool_id", name=op.f("pk_erasure_spool")),
    )
    op.create_table(
        "erased_row",
        sa.Column("request_id", sa.UUID(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("row_id", sa.UUID(), nullable=False),
        sa.CheckConstraint("kind IN ('interaction', 'example')", name=op.f("ck_erased_row_kind")),
        _of_request("erased_row"),
        sa.PrimaryKeyConstraint("request_id", "kind", "row_id", name=op.f("pk_erased_row")),
    )

    for table, columns in FROZEN.items():
        op.execute(
            f"CREATE TRIGGER refuse_change BEFORE UPDATE OF {columns} ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION whet_refuse_change()"
        )


def _of_request(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["request_id"], ["erasure_request.id"], name=op.f(f"fk_{table}_request_id"), ondelete="CASCADE"
    )


def downgrade() -> None:
    for table in FROZEN:
        op.execute(f"DROP TRIGGER refuse_change ON {table}")
    for table in ("erased_row", "erasure_spool", "log_spool"):
        op.drop_table(table)
