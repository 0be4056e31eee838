"""Runs: which older examples a run replayed.

Safe beside the running release: a new table that it does not know.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_runs"
down_revision = "2026_11_30_invited_by_key"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "run_example",
        sa.Column("run_id", sa.UUID(), nullable=False),
        sa.Column("example_id", sa.UUID(), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["example.id"], name=op.f("fk_run_example_example_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_example_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "example_id", name=op.f("pk_run_example")),
    )
    op.create_index(op.f("ix_run_example_example_id"), "run_example", ["example_id"], unique=False)


def downgrade() -> None:
    op.drop_index(op.f("ix_run_example_example_id"), table_name="run_example")
    op.drop_table("run_example")
