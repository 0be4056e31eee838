"""Rows from before newer rules and words: no run replays what measures forgetting, a run says where its weights are by
now, and a canary under way keeps the users it has counted.

UPDATEs of small tables, and one INSERT of a row for each user of a canary under way. Safe beside the running release,
which understands all of it. Until that stops it writes as it did: a replay of the measure that is configured just then
is refused later, in words, and users counted just then are missing from the split, in both arms alike.
"""

from alembic import op

revision = "2026_11_30_caught_up"
down_revision = "2026_11_30_imitation"
branch_labels = None
depends_on = None

MEASURE = "base-ability"
# Where a project's configuration can name it: plain names are sft's.
CONFIGURED = ("{train,replay_from}", "{train,sft,replay_from}", "{train,dpo,replay_from}", "{train,kto,replay_from}")


def upgrade() -> None:
    _replay_no_measure()
    _tell_where_weights_are()
    _count_the_routed()


def _replay_no_measure() -> None:
    """Runs that succeeded go on saying what they were told; all others may be begun, or tried again."""
    for path in CONFIGURED:
        op.execute(f"UPDATE project SET config = config #- '{path}' WHERE config #>> '{path}' = '{MEASURE}'")
    op.execute(
        f"""
        UPDATE run SET params = params || '{{"replay_from": ""}}'
        WHERE params ->> 'replay_from' = '{MEASURE}' AND state <> 'succeeded'
        """
    )


def _tell_where_weights_are() -> None:
    """Of runs that are over: those whose weights serve or are tried now, those that still say so of weights that went,
    and those that failed and whose weights served all the same. Said as of the weights' last change."""
    op.execute(
        """
        WITH told AS (
            UPDATE run SET phase = replace(a.state, '_', ' '), state = 'succeeded', error = NULL
            FROM artifact a
            WHERE a.digest = run.artifact_digest AND run.state NOT IN ('queued', 'running')
              AND run.phase <> replace(a.state, '_', ' ')
              AND (a.state IN ('shadow', 'canary', 'live')
                   OR (a.state IN ('retired', 'rolled_back', 'quarantined')
                       AND run.phase IN ('shadow', 'canary', 'live'))
                   OR (a.state IN ('retired', 'rolled_back') AND run.state <> 'succeeded'))
            RETURNING run.id, run.phase, run.artifact_digest AS digest
        )
        INSERT INTO run_event (run_id, at, kind, payload)
        SELECT id, coalesce((SELECT max(e.at) FROM deployment_event e WHERE digest IN (e.from_digest, e.to_digest)),
                            now()),
               'phase', jsonb_build_object('phase', phase)
        FROM told
        """
    )


def _count_the_routed() -> None:
    """Until now every request counted among the errors, as one or as none."""
    op.execute(
        """
        INSERT INTO rollout_count (rollout_id, metric, arm, unit, n, total)
        SELECT rollout_id, 'routed', arm, unit, n, 0 FROM rollout_count WHERE metric = 'errors'
        ON CONFLICT DO NOTHING
        """
    )


def downgrade() -> None:
    """The release before counts no routed requests. Nothing else has to be undone: it accepts what is there."""
    op.execute("DELETE FROM rollout_count WHERE metric = 'routed'")
