"""Rollout: a candidate's way to traffic, what a canary is judged by, shadow answers, what engines report.

Safe beside the running release: new tables, and columns of the small deployment table that are nullable or have a
constant default. The artefact's CHECK is replaced by a wider one (ACCESS EXCLUSIVE on a table of few rows).
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_rollout"
down_revision = "2026_11_30_hooks"
branch_labels = None
depends_on = None

JSONB = postgresql.JSONB(astext_type=sa.Text())
MOMENT = sa.DateTime(timezone=True)
NOW = sa.text("now()")
BEFORE = ("built", "verified", "staged", "canary", "live", "retired", "rejected", "quarantined", "rolled_back")
AFTER = ("built", "verified", "staged", "shadow", *BEFORE[3:])
STAGES = ("shadow", "canary", "promoted", "rolled_back", "rejected", "quarantined", "stopped", "superseded")


def upgrade() -> None:
    _allow_states(AFTER)
    op.add_column("deployment", sa.Column("automatic_rollbacks", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("deployment", sa.Column("probe_until", MOMENT, nullable=True))
    op.create_table(
        "rollout",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("baseline_digest", sa.Text(), nullable=True),
        sa.Column("run_id", sa.UUID(), nullable=True),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("share", sa.Float(), server_default="0", nullable=False),
        sa.Column("salt", sa.Text(), nullable=False),
        sa.Column("config", JSONB, nullable=False),
        sa.Column("reference", JSONB, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("verdict", JSONB, server_default=sa.text("'{}'"), nullable=False),
        sa.Column("track", JSONB, server_default=sa.text("'[]'"), nullable=False),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("canary_at", MOMENT, nullable=True),
        sa.Column("folded_until", MOMENT, nullable=True),
        sa.Column("looked_at", MOMENT, nullable=True),
        sa.Column("ended_at", MOMENT, nullable=True),
        sa.Column("ending", sa.Text(), nullable=True),
        sa.CheckConstraint(_one_of("stage", STAGES), name=op.f("ck_rollout_stage")),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_rollout_project_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["digest"], ["artifact.digest"], name=op.f("fk_rollout_digest")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_rollout_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollout")),
    )
    op.create_index(
        "uq_rollout_open", "rollout", ["project_id"], unique=True,
        postgresql_where=sa.text("stage IN ('shadow', 'canary')"),
    )  # fmt: skip
    op.create_index(op.f("ix_rollout_project_id_id"), "rollout", ["project_id", "id"])
    op.create_table(
        "rollout_count",
        sa.Column("rollout_id", sa.UUID(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("arm", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["rollout_id"], ["rollout.id"], name=op.f("fk_rollout_count_rollout_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("rollout_id", "metric", "arm", "unit", name=op.f("pk_rollout_count")),
    )
    op.create_table(
        "shadow_answer",
        sa.Column("rollout_id", sa.UUID(), nullable=False),
        sa.Column("interaction_id", sa.UUID(), nullable=False),
        sa.Column("shadow_id", sa.UUID(), nullable=False),
        sa.Column("differs", sa.Boolean(), nullable=False),
        sa.Column("live", JSONB, nullable=False),
        sa.Column("candidate", JSONB, nullable=False),
        sa.Column("created_at", MOMENT, server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(
            ["rollout_id"], ["rollout.id"], name=op.f("fk_shadow_answer_rollout_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("rollout_id", "interaction_id", name=op.f("pk_shadow_answer")),
    )
    op.create_index(op.f("ix_shadow_answer_interaction_id"), "shadow_answer", ["interaction_id"])
    op.create_table(
        "engine_report",
        sa.Column("engine", sa.Text(), nullable=False),
        sa.Column("project_id", sa.UUID(), nullable=False),
        sa.Column("epoch", sa.Text(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("digests", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("seen_at", MOMENT, server_default=NOW, nullable=False),
        sa.Column("changed_at", MOMENT, server_default=NOW, nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_engine_report_project_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("engine", "project_id", name=op.f("pk_engine_report")),
    )


def downgrade() -> None:
    for table in ("engine_report", "shadow_answer", "rollout_count", "rollout"):
        op.drop_table(table)
    op.drop_column("deployment", "probe_until")
    op.drop_column("deployment", "automatic_rollbacks")
    op.execute("UPDATE artifact SET state = 'staged' WHERE state = 'shadow'")
    _allow_states(BEFORE)


def _allow_states(states: tuple[str, ...]) -> None:
    op.drop_constraint(op.f("ck_artifact_state"), "artifact", type_="check")
    op.create_check_constraint(op.f("ck_artifact_state"), "artifact", _one_of("state", states))


def _one_of(column: str, values: tuple[str, ...]) -> str:
    listed = ", ".join(f"'{value}'" for value in values)
    return f"{column} IN ({listed})"
