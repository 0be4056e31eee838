"""The gate: answers kept between evaluations, where a row's scores came from, overrides, levels handed on.

Safe beside the running release: one new table, and columns that are nullable or have a constant default, on tables that
are small or, for evaluation_row, changed without a rewrite.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_gate"
down_revision = "2026_11_30_runs"
branch_labels = None
depends_on = None

MOMENT = sa.DateTime(timezone=True)
JSONB = postgresql.JSONB(astext_type=sa.Text())


def upgrade() -> None:
    op.create_table(
        "evaluation_answer",
        sa.Column("example_id", sa.UUID(), nullable=False),
        sa.Column("weights", sa.Text(), nullable=False),
        sa.Column("request_hash", sa.Text(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("finish_reason", sa.Text(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("likelihood", sa.Double(), nullable=True),
        sa.Column("created_at", MOMENT, server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["example_id"], ["example.id"], name=op.f("fk_evaluation_answer_example_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_evaluation_answer_project_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("example_id", "weights", "request_hash", name=op.f("pk_evaluation_answer")),
    )
    op.create_index(op.f("ix_evaluation_answer_project_id"), "evaluation_answer", ["project_id"])
    op.add_column("revision", sa.Column("look_carry", sa.Double(), server_default="0", nullable=False))
    op.add_column("evaluation_row", sa.Column("details", JSONB, server_default=sa.text("'{}'"), nullable=False))
    op.add_column("evaluation", sa.Column("overridden_at", MOMENT, nullable=True))
    op.add_column("evaluation", sa.Column("overridden_by", sa.Text(), nullable=True))
    op.add_column("evaluation", sa.Column("override_reason", sa.Text(), nullable=True))


def downgrade() -> None:
    for column in ("override_reason", "overridden_by", "overridden_at"):
        op.drop_column("evaluation", column)
    op.drop_column("evaluation_row", "details")
    op.drop_column("revision", "look_carry")
    op.drop_table("evaluation_answer")
