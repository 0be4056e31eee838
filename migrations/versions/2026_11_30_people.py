"""People: invitations, OIDC identities, sessions one can name, keys that rotate, redaction of the audit log.

Locks: ACCESS EXCLUSIVE for an instant on api_key, user_account, audit_event and session; `session` is rewritten, for
each row gets an id of its own, and it is small. The append-only trigger of audit_event is exchanged within the same
transaction. Safe beside the running release: it names the columns it writes, and every new column is NULL or defaulted.
"""

import sqlalchemy as sa
from alembic import op

revision = "2026_11_30_people"
down_revision = "2026_11_22_speculation"
branch_labels = None
depends_on = None

ROLES = "role IN ('viewer', 'reviewer', 'lead', 'operator', 'admin')"
# Everything about an event stands for ever but the text that may name a person, and that changes only by redaction.
REDACT = """
    CREATE FUNCTION whet_only_redact() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF NEW.redacted_at IS NULL OR NEW.redacted_at <= COALESCE(OLD.redacted_at, '-infinity') THEN
            RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
        END IF;
        RETURN NEW;
    END $$
"""


def upgrade() -> None:
    op.add_column("user_account", sa.Column("deleted_at", sa.DateTime(timezone=True)))
    _invitations_and_identities()
    _sessions()
    _keys()
    op.add_column("audit_event", sa.Column("redacted_at", sa.DateTime(timezone=True)))
    op.execute("DROP TRIGGER append_only ON audit_event")
    op.execute(
        "CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OF id, at, action, previous_hash, hash ON audit_event "
        "FOR EACH STATEMENT EXECUTE FUNCTION whet_refuse_change()"
    )
    op.execute(REDACT)
    op.execute(
        "CREATE TRIGGER only_redact BEFORE UPDATE ON audit_event FOR EACH ROW EXECUTE FUNCTION whet_only_redact()"
    )


def _invitations_and_identities() -> None:
    op.create_table(
        "invitation",
        sa.Column("id", sa.UUID(), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("project_id", sa.UUID()),
        sa.Column("invited_by", sa.UUID()),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True)),
        sa.Column("accepted_at", sa.DateTime(timezone=True)),
        sa.Column("user_id", sa.UUID()),
        sa.CheckConstraint(ROLES, name=op.f("ck_invitation_role")),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_invitation_project_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["invited_by"], ["user_account.id"], name=op.f("fk_invitation_invited_by")),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name=op.f("fk_invitation_user_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitation")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_invitation_token_hash")),
    )
    op.create_index(op.f("ix_invitation_email"), "invitation", ["email"])
    op.create_table(
        "user_identity",
        sa.Column("issuer", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("user_id", sa.UUID(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["user_id"], ["user_account.id"], name=op.f("fk_user_identity_user_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("issuer", "subject", name=op.f("pk_user_identity")),
        sa.UniqueConstraint("user_id", "issuer", name=op.f("uq_user_identity_user_id_issuer")),
    )


def _sessions() -> None:
    identity = sa.Column("id", sa.UUID(), server_default=sa.text("gen_random_uuid()"), nullable=False)
    op.add_column("session", identity)
    op.add_column("session", sa.Column("method", sa.Text(), server_default="link", nullable=False))
    op.add_column("session", sa.Column("device", sa.Text(), server_default="", nullable=False))
    op.add_column("session", sa.Column("last_seen_at", sa.DateTime(timezone=True)))
    op.create_unique_constraint(op.f("uq_session_id"), "session", ["id"])
    op.create_check_constraint(op.f("ck_session_method"), "session", "method IN ('link', 'invitation', 'oidc')")


def _keys() -> None:
    for column, table in (("user_id", "user_account"), ("created_by", "user_account"), ("rotated_from", "api_key")):
        op.add_column("api_key", sa.Column(column, sa.UUID()))
        op.create_foreign_key(op.f(f"fk_api_key_{column}"), "api_key", table, [column], ["id"])
    op.create_unique_constraint(op.f("uq_api_key_rotated_from"), "api_key", ["rotated_from"])


def downgrade() -> None:
    """Redacted rows stay redacted, and the release before cannot verify them: there is no way back to erased text."""
    op.execute("DROP TRIGGER only_redact ON audit_event")
    op.execute("DROP FUNCTION whet_only_redact()")
    op.execute("DROP TRIGGER append_only ON audit_event")
    op.execute(
        "CREATE TRIGGER append_only BEFORE UPDATE OR DELETE ON audit_event "
        "FOR EACH STATEMENT EXECUTE FUNCTION whet_refuse_change()"
    )
    op.drop_column("audit_event", "redacted_at")
    for column in ("rotated_from", "created_by", "user_id"):
        op.drop_column("api_key", column)
    op.drop_constraint(op.f("ck_session_method"), "session", type_="check")
    for column in ("last_seen_at", "device", "method", "id"):
        op.drop_column("session", column)
    op.drop_table("user_identity")
    op.drop_index(op.f("ix_invitation_email"), table_name="invitation")
    op.drop_table("invitation")
    op.drop_column("user_account", "deleted_at")
