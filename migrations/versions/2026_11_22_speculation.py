"""Speculation: what a request's drafts were worth, a canary and a way back for speculators, a run of its own kind.

Safe beside the running release: it names the columns it writes, a constant default rewrites no partition, and the new
index only allows more than the old one did.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_22_speculation"
down_revision = "2026_11_21_initial"
branch_labels = None
depends_on = None

DIGESTS = ("speculator_canary_digest", "speculator_last_good_digest")
UNFINISHED = sa.text("state IN ('queued', 'running')")


def upgrade() -> None:
    op.add_column("interaction", sa.Column("speculated", sa.Boolean(), server_default="true", nullable=False))
    op.add_column("interaction", sa.Column("speculation", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    for digest in DIGESTS:
        op.add_column("deployment", sa.Column(digest, sa.Text(), nullable=True))
        op.create_foreign_key(op.f(f"fk_deployment_{digest}"), "deployment", "artifact", [digest], ["digest"])
    op.add_column("deployment", sa.Column("speculator_share", sa.Double(), server_default="0", nullable=False))
    op.drop_index("uq_run_unfinished", table_name="run")
    op.create_index(
        "uq_run_unfinished",
        "run",
        ["project_id", sa.text("(kind = 'speculator')")],
        unique=True,
        postgresql_where=UNFINISHED,
    )


def downgrade() -> None:
    """Of two unfinished runs of a project the speculator's is ended: the older index has room for one."""
    op.execute(
        """
        UPDATE run SET state = 'cancelled', phase = 'cancelled', finished_at = now(),
            error = 'the database went back to a release that trains no speculators'
        WHERE kind = 'speculator' AND state IN ('queued', 'running')
        """
    )
    op.drop_index("uq_run_unfinished", table_name="run")
    op.create_index("uq_run_unfinished", "run", ["project_id"], unique=True, postgresql_where=UNFINISHED)
    op.drop_column("deployment", "speculator_share")
    for digest in reversed(DIGESTS):
        op.drop_constraint(op.f(f"fk_deployment_{digest}"), "deployment", type_="foreignkey")
        op.drop_column("deployment", digest)
    op.drop_column("interaction", "speculation")
    op.drop_column("interaction", "speculated")
