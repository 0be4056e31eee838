"""Small indexes for what pages ask all the time: how many wait, by state and strategy; what somebody judged last; what
leads decided.

Built concurrently: nobody who writes waits. An invalid rest of a build that was cut short goes first. The running
release needs to know nothing of them.
"""

from alembic import op

revision = "2026_11_30_counts"
down_revision = "2026_11_30_adjudication"
branch_labels = None
depends_on = None

INDEXES = {
    "ix_review_item_counts": "review_item (project_id, state, strategy)",
    "ix_annotation_author": "annotation (author_id, project_id, created_at)",
    "ix_annotation_decisions": "annotation (project_id, created_at) WHERE adjudicates",
}


def upgrade() -> None:
    with op.get_context().autocommit_block():
        # Waiting for other transactions to end is what "concurrently" means; nobody queues behind that wait.
        op.execute("SET lock_timeout = 0")
        for index, definition in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {index}")
            op.execute(f"CREATE INDEX CONCURRENTLY {index} ON {definition}")
        op.execute("SET lock_timeout = '5s'")


def downgrade() -> None:
    for index in INDEXES:
        op.execute(f"DROP INDEX {index}")
