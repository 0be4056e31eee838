"""Sampling: indexes for the queue's inflow and drain, and for the prompts reviewed last.

Built concurrently: `review_item` stays open to readers and writers, and each index waits for transactions that began
before it. Safe beside the running release, which does not need them.
"""

from alembic import op

revision = "2026_11_30_sampling"
down_revision = "2026_11_30_search"
branch_labels = None
depends_on = None

COLUMNS = ("created_at", "done_at")


def upgrade() -> None:
    with op.get_context().autocommit_block():
        for column in COLUMNS:
            op.create_index(
                op.f(f"ix_review_item_project_id_{column}"), "review_item", ["project_id", column], unique=False,
                postgresql_concurrently=True, if_not_exists=True,
            )  # fmt: skip


def downgrade() -> None:
    with op.get_context().autocommit_block():
        for column in reversed(COLUMNS):
            op.drop_index(
                op.f(f"ix_review_item_project_id_{column}"), table_name="review_item", postgresql_concurrently=True,
                if_exists=True,
            )  # fmt: skip
