"""Golden data: what a revision left out and why, imports, sides assigned before labelling, personal data marked.

Locks: `example`, `revision` and `review_item`'s readers are not kept waiting but for the moment of each ALTER (ACCESS
EXCLUSIVE, no table is rewritten; the CHECK on `example` is validated under SHARE UPDATE EXCLUSIVE). The backfill of
`split_group` only reads `review_item`. Safe beside the running release: it inserts with named columns, and new ones
are nullable or have constant defaults.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_golden"
down_revision = "2026_11_30_sampling"
branch_labels = None
depends_on = None

BEFORE = "source IN ('accepted', 'corrected', 'rejected', 'imported')"
AFTER = "source IN ('accepted', 'corrected', 'rejected', 'preferred', 'imported')"


def upgrade() -> None:
    op.add_column("example", sa.Column("pii", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False))
    op.add_column("revision", sa.Column("held_out_digest", sa.Text(), nullable=True))
    _check(AFTER)
    op.create_table(
        "revision_left_out",
        sa.Column("revision_id", sa.UUID(), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("interaction_id", sa.UUID(), nullable=True),
        sa.Column("cause", sa.Text(), nullable=False),
        _reference("revision_left_out", "revision_id", "revision.id"),
        sa.PrimaryKeyConstraint("revision_id", "position", name=op.f("pk_revision_left_out")),
    )
    op.create_index(op.f("ix_revision_left_out_interaction_id"), "revision_left_out", ["interaction_id"])
    _imports()
    _sides()


def _imports() -> None:
    op.create_table(
        "dataset_import",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("dataset_id", sa.UUID(), nullable=False),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("file_digest", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("mapping", postgresql.JSONB(astext_type=sa.Text()), server_default="{}", nullable=False),
        sa.Column("rows", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("duplicates", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.CheckConstraint("state IN ('preview', 'done')", name=op.f("ck_dataset_import_state")),
        _reference("dataset_import", "dataset_id", "dataset.id"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_dataset_import")),
    )
    op.create_index(op.f("ix_dataset_import_dataset_id_created_at"), "dataset_import", ["dataset_id", "created_at"])
    op.create_table(
        "dataset_import_example",
        sa.Column("import_id", sa.UUID(), nullable=False),
        sa.Column("example_id", sa.UUID(), nullable=False),
        _reference("dataset_import_example", "import_id", "dataset_import.id"),
        _reference("dataset_import_example", "example_id", "example.id"),
        sa.PrimaryKeyConstraint("import_id", "example_id", name=op.f("pk_dataset_import_example")),
    )
    op.create_index(op.f("ix_dataset_import_example_example_id"), "dataset_import_example", ["example_id"])


def _sides() -> None:
    op.create_table(
        "split_group",
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("group_key", sa.Text(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        _reference("split_group", "project_id", "project.id"),
        sa.PrimaryKeyConstraint("project_id", "group_key", name=op.f("pk_split_group")),
    )
    op.execute(
        """
        INSERT INTO split_group (project_id, group_key, split)
        SELECT project_id, group_key, max(split) FROM review_item GROUP BY project_id, group_key
        """
    )
    op.create_table(
        "prompt_cluster",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("split", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.BigInteger(), nullable=False),
        sa.Column("sketch", sa.LargeBinary(), nullable=False),
        sa.Column("bands", postgresql.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("members", sa.BigInteger(), server_default="1", nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        _reference("prompt_cluster", "project_id", "project.id"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prompt_cluster")),
    )
    op.create_index("ix_prompt_cluster_bands", "prompt_cluster", ["bands"], postgresql_using="gin")
    op.create_index(op.f("ix_prompt_cluster_project_id"), "prompt_cluster", ["project_id"])


def _reference(table: str, column: str, target: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [target], name=op.f(f"fk_{table}_{column}"), ondelete="CASCADE")


def _check(condition: str) -> None:
    op.drop_constraint(op.f("ck_example_source"), "example", type_="check")
    op.execute(f"ALTER TABLE example ADD CONSTRAINT ck_example_source CHECK ({condition}) NOT VALID")
    op.execute("ALTER TABLE example VALIDATE CONSTRAINT ck_example_source")


def downgrade() -> None:
    """Preferred pairs become corrections, the older release's word for a pair; imports stay as examples."""
    for table in ("prompt_cluster", "split_group", "dataset_import_example", "dataset_import", "revision_left_out"):
        op.drop_table(table)
    op.execute("UPDATE example SET source = 'corrected' WHERE source = 'preferred'")
    _check(BEFORE)
    op.drop_column("revision", "held_out_digest")
    op.drop_column("example", "pii")
