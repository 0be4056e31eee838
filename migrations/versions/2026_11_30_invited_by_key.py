"""Invitations know the API key that made them, so that they end with it.

Locks: ACCESS EXCLUSIVE for an instant on invitation, SHARE ROW EXCLUSIVE on api_key. Safe beside the running release:
the column is NULL for what it writes.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_invited_by_key"
down_revision = "2026_11_30_erasing"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("invitation", sa.Column("invited_by_key", sa.UUID()))
    op.create_foreign_key(
        op.f("fk_invitation_invited_by_key"), "invitation", "api_key", ["invited_by_key"], ["id"], ondelete="CASCADE"
    )


def downgrade() -> None:
    op.drop_column("invitation", "invited_by_key")
