"""A small index that counts the queue by state and strategy without reading its rows: every page shows such a count.

Built concurrently: nobody who writes waits. An invalid rest of a build that was cut short goes first. The running
release needs to know nothing of it.
"""

from alembic import op

revision = "2026_11_30_counts"
down_revision = "2026_11_30_adjudication"
branch_labels = None
depends_on = None

INDEX = "ix_review_item_counts"


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # Waiting for other transactions to end is what "concurrently" means; nobody queues behind that wait.
        op.execute("SET lock_timeout = 0")
        op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {INDEX}")
        op.execute(f"CREATE INDEX CONCURRENTLY {INDEX} ON review_item (project_id, state, strategy)")
        op.execute("SET lock_timeout = '5s'")


def downgrade() -> None:
    op.execute(f"DROP INDEX {INDEX}")
