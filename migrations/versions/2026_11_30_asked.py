"""Examples keep the tools that their request offered.

Safe beside the running release: one nullable column, added without a rewrite; the lock lasts a moment.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_asked"
down_revision = "2026_11_30_looks"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("example", sa.Column("asked", postgresql.JSONB(astext_type=sa.Text()), nullable=True))


def downgrade() -> None:
    op.drop_column("example", "asked")
