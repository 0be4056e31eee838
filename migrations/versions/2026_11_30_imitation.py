"""Runs of kind kto from before they imitated say so, and are tried again as they were.

One UPDATE of a small table. Beside the running release one thing fails: its worker refuses a kto run that is unfinished
just then, for a parameter it does not know; the run can be tried again.
"""

from alembic import op

revision = "2026_11_30_imitation"
down_revision = "2026_11_30_asked"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        UPDATE run SET params = params || '{"sft_weight": 0.0}'
        WHERE kind = 'kto' AND NOT jsonb_exists(params, 'sft_weight')
        """
    )


def downgrade() -> None:
    op.execute("UPDATE run SET params = params - 'sft_weight' WHERE kind = 'kto'")
