"""Adjudication by one of the judges, where no other lead is left: `annotation.again` marks what was said a second time.

The trigger that lets nobody judge an item twice lets a second judgement through when it says of itself that it is one.
Takes ACCESS EXCLUSIVE on `annotation` while a column with a constant default is added (no rewrite) and the CHECK is
tried on every row. Safe beside the running release: what it writes is never said again.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_adjudication"
down_revision = "2026_11_30_instant"
branch_labels = None
depends_on = None

STANDS = """
    one.verdict <> 'undo'
    AND NOT EXISTS (SELECT 1 FROM annotation undo WHERE undo.supersedes = one.id AND undo.verdict = 'undo')
"""
COUNTED = f"""
    {STANDS} AND one.verdict IN ('accept', 'correct', 'reject', 'prefer') AND NOT one.checked AND NOT one.adjudicates
"""


def upgrade() -> None:
    op.add_column("annotation", sa.Column("again", sa.Boolean(), server_default="false", nullable=False))
    op.create_check_constraint(
        op.f("ck_annotation_again"), "annotation", "NOT again OR adjudicates OR verdict = 'skip'"
    )
    _judge_once_per("one.author_id, one.again")


def downgrade() -> None:
    """What was decided by a judge is undone and waits for another lead: the older release knows one voice a person."""
    op.execute(
        f"""
        WITH undone AS (
            INSERT INTO annotation (id, project_id, review_item_id, interaction_id, author_id, idempotency_key, verdict,
                tags, spans, assisted, supersedes)
            SELECT gen_random_uuid(), one.project_id, one.review_item_id, one.interaction_id, one.author_id,
                'undo:' || one.id, 'undo', '{{}}', '[]', false, one.id
            FROM annotation one WHERE one.again AND {STANDS}
            RETURNING review_item_id
        )
        UPDATE review_item SET done_at = NULL,
            state = CASE WHEN judged >= overlap_target THEN 'disputed' ELSE 'escalated' END
        WHERE state = 'done' AND id IN (SELECT review_item_id FROM undone)
        """
    )
    _judge_once_per("one.author_id")
    op.drop_constraint(op.f("ck_annotation_again"), "annotation", type_="check")
    op.drop_column("annotation", "again")


def _judge_once_per(columns: str) -> None:
    op.execute(
        f"""
        CREATE OR REPLACE FUNCTION whet_count_judgements() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE item uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.review_item_id ELSE NEW.review_item_id END;
        BEGIN
            PERFORM 1 FROM review_item WHERE id = item FOR NO KEY UPDATE;
            IF EXISTS (
                SELECT 1 FROM annotation one WHERE one.review_item_id = item AND {STANDS}
                GROUP BY {columns} HAVING count(*) > 1
            ) THEN
                RAISE EXCEPTION 'one person judges an item once' USING ERRCODE = 'unique_violation';
            END IF;
            UPDATE review_item SET judged = (
                SELECT count(*) FROM annotation one WHERE one.review_item_id = item AND {COUNTED}
            ) WHERE id = item;
            RETURN NULL;
        END $$
        """
    )
