"""Review: pairs, hidden gold items, disputes and their adjudication, a count of judgements nobody can go beyond, keys.

`review_item.judged` is counted by a trigger under the item's row lock, and a CHECK holds it to the overlap target:
whoever inserts a judgement, by whatever code and however many at once, the target is met exactly or the insert fails.

Takes ACCESS EXCLUSIVE on `review_item` and `annotation` while columns with constant defaults are added (no rewrite),
the CHECKs are tried on every row and the two small indexes are built; both tables grow at the pace of people.
Safe beside the running release: it names the columns it writes and reads, and its judgements are counted too.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_30_review"
down_revision = "2026_11_30_golden"
branch_labels = None
depends_on = None

STATES = "state IN ('open', 'done', 'escalated', 'disputed', 'withdrawn')"
VERDICTS = "verdict IN ('accept', 'correct', 'reject', 'prefer', 'skip', 'escalate', 'undo')"

# A judgement that nobody has taken back; `undo` rows are no judgements.
STANDS = """
    one.verdict <> 'undo'
    AND NOT EXISTS (SELECT 1 FROM annotation undo WHERE undo.supersedes = one.id AND undo.verdict = 'undo')
"""
COUNTED = f"""
    {STANDS} AND one.verdict IN ('accept', 'correct', 'reject', 'prefer') AND NOT one.checked AND NOT one.adjudicates
"""
# The row lock comes in a statement of its own: the count after it then sees what others committed before we got it.
# Not FOR UPDATE: two inserts at once already share the row by their foreign keys, and would wait for each other.
COUNT_JUDGEMENTS = f"""
    CREATE FUNCTION whet_count_judgements() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE item uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.review_item_id ELSE NEW.review_item_id END;
    BEGIN
        PERFORM 1 FROM review_item WHERE id = item FOR NO KEY UPDATE;
        IF EXISTS (
            SELECT 1 FROM annotation one WHERE one.review_item_id = item AND {STANDS}
            GROUP BY one.author_id HAVING count(*) > 1
        ) THEN
            RAISE EXCEPTION 'one person judges an item once' USING ERRCODE = 'unique_violation';
        END IF;
        UPDATE review_item SET judged = (
            SELECT count(*) FROM annotation one WHERE one.review_item_id = item AND {COUNTED}
        ) WHERE id = item;
        RETURN NULL;
    END $$
"""
# Judged enough but not alike: what two people typed is compared as the builder compares it.
DISPUTES = f"""
    UPDATE review_item SET state = 'disputed', done_at = NULL WHERE state = 'done' AND id IN (
        SELECT one.review_item_id FROM annotation one WHERE {COUNTED}
        GROUP BY one.review_item_id
        HAVING count(DISTINCT (one.verdict, regexp_replace(normalize(coalesce(one.correction, '')), '\\s+$', ''))) > 1
    )
"""


def upgrade() -> None:
    op.add_column("review_item", sa.Column("judged", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("review_item", sa.Column("alternative", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("review_item", sa.Column("gold", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("annotation", sa.Column("preference", sa.Text(), nullable=True))
    for flag in ("checked", "adjudicates"):
        op.add_column("annotation", sa.Column(flag, sa.Boolean(), server_default="false", nullable=False))
    _check("review_item", "state", STATES)
    _check("annotation", "verdict", VERDICTS)
    op.create_check_constraint(
        op.f("ck_annotation_preference"), "annotation", "preference IN ('response', 'alternative', 'tie')"
    )
    op.create_check_constraint(
        op.f("ck_annotation_prefer"), "annotation", "(verdict = 'prefer') = (preference IS NOT NULL)"
    )
    op.create_index(
        "ix_annotation_supersedes", "annotation", ["supersedes"], postgresql_where=sa.text("supersedes IS NOT NULL")
    )
    op.create_index("ix_review_item_gold", "review_item", ["project_id"], postgresql_where=sa.text("gold IS NOT NULL"))
    op.execute(
        f"""
        UPDATE review_item SET judged = least(overlap_target, counted.judged) FROM (
            SELECT one.review_item_id, count(*) AS judged FROM annotation one WHERE {COUNTED} GROUP BY 1
        ) counted WHERE counted.review_item_id = review_item.id
        """
    )
    op.execute(DISPUTES)
    op.create_check_constraint(op.f("ck_review_item_judged"), "review_item", "judged BETWEEN 0 AND overlap_target")
    op.execute(COUNT_JUDGEMENTS)
    op.execute(
        "CREATE TRIGGER count_judgements AFTER INSERT OR UPDATE OR DELETE ON annotation "
        "FOR EACH ROW EXECUTE FUNCTION whet_count_judgements()"
    )
    op.create_table(
        "review_keys",
        sa.Column("user_id", sa.UUID(), nullable=False),
        sa.Column("keys", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["user_account.id"], name=op.f("fk_review_keys_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_review_keys")),
    )


def downgrade() -> None:
    """Answers to hidden checks are undone, because the older release would count them; preferences stay, unread."""
    op.drop_table("review_keys")
    op.execute("DROP TRIGGER count_judgements ON annotation")
    op.execute("DROP FUNCTION whet_count_judgements()")
    op.execute(
        f"""
        INSERT INTO annotation (id, project_id, review_item_id, interaction_id, author_id, idempotency_key, verdict,
            tags, spans, assisted, supersedes)
        SELECT gen_random_uuid(), one.project_id, one.review_item_id, one.interaction_id, one.author_id,
            'undo:' || one.id, 'undo', '{{}}', '[]', false, one.id
        FROM annotation one WHERE one.checked AND {STANDS}
        """
    )
    op.execute("UPDATE review_item SET state = 'done', done_at = now() WHERE state = 'disputed'")
    op.drop_constraint(op.f("ck_review_item_judged"), "review_item", type_="check")
    for name in ("ck_annotation_prefer", "ck_annotation_preference"):
        op.drop_constraint(op.f(name), "annotation", type_="check")
    _check("review_item", "state", STATES.replace(" 'disputed',", ""))
    # Not validated: judgements are never deleted, and preferences were stored meanwhile.
    _check("annotation", "verdict", VERDICTS.replace(" 'prefer',", ""), checked=False)
    op.drop_index("ix_review_item_gold", table_name="review_item")
    op.drop_index("ix_annotation_supersedes", table_name="annotation")
    for column in ("adjudicates", "checked", "preference"):
        op.drop_column("annotation", column)
    for column in ("gold", "alternative", "judged"):
        op.drop_column("review_item", column)


def _check(table: str, column: str, condition: str, *, checked: bool = True) -> None:
    """Put another condition in the place of a CHECK."""
    name = op.f(f"ck_{table}_{column}")
    op.drop_constraint(name, table, type_="check")
    op.create_check_constraint(name, table, condition, postgresql_not_valid=not checked)
