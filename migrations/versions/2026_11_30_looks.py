"""Gate looks shared by every revision that has most of its held-out rows from another, not by those before it alone.

Safe beside the running release: one nullable column on a small table, locked for a moment. A revision that the running
release makes meanwhile begins a count of its own. Revisions made before share from here on what the most looked-at of
them counts.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_looks"
down_revision = "2026_11_30_rollout"
branch_labels = None
depends_on = None

SHARE = """
    WITH RECURSIVE child AS (
        SELECT r.id, p.id AS parent
        FROM revision r JOIN revision p ON p.dataset_id = r.dataset_id AND p.digest = r.parent_digest
        WHERE r.held_out_count > 0 AND r.held_out_count <= 2 * (
            SELECT count(*) FROM revision_example mine
            JOIN revision_example theirs USING (content_hash, split)
            WHERE mine.revision_id = r.id AND theirs.revision_id = p.id AND split = 'held_out')
    ), sharing AS (
        SELECT id, id AS first FROM revision WHERE id NOT IN (SELECT id FROM child)
        UNION ALL SELECT child.id, first FROM child JOIN sharing ON sharing.id = child.parent
    )
    UPDATE revision SET look_budget = first FROM sharing WHERE sharing.id = revision.id AND first <> revision.id
"""
COUNT = """
    UPDATE revision SET looks = most.looks, look_carry = most.carry
    FROM (SELECT coalesce(look_budget, id) AS budget, max(looks) AS looks,
                 (array_agg(look_carry ORDER BY looks DESC, id DESC))[1] AS carry
          FROM revision GROUP BY 1) most
    WHERE coalesce(look_budget, id) = most.budget
"""


def upgrade() -> None:
    op.add_column("revision", sa.Column("look_budget", sa.UUID(), nullable=True))
    op.execute(SHARE)
    op.execute(COUNT)


def downgrade() -> None:
    op.drop_column("revision", "look_budget")
