"""The audit chain: concurrent writers keep it whole, and every kind of tampering shows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from services.store import audit
from services.store.base import Sessions

TAMPERING = {
    "a changed actor": "UPDATE audit_event SET actor = 'mallory' WHERE id = :id",
    "a changed detail": "UPDATE audit_event SET detail = '{\"n\": 99}' WHERE id = :id",
    "a shifted time": "UPDATE audit_event SET at = at + interval '1 microsecond' WHERE id = :id",
    "a removed row": "DELETE FROM audit_event WHERE id = :id",
}


def write(sessions: Sessions, count: int) -> list[int]:
    ids = []
    for number in range(count):
        with sessions.begin() as session:
            detail = {"n": number, "share": 1e20, "half": 0.5, "text": "Zoë → \x01", "none": None}
            ids.append(audit.record(session, "ada", "test.act", f"thing:{number}", detail).id)
    return ids


def test_an_untouched_chain_is_intact(sessions: Sessions) -> None:
    write(sessions, 5)

    with sessions() as session:
        verdict = audit.verify(session)
    assert (verdict.intact, verdict.rows) == (True, 5)


def test_concurrent_writers_form_one_chain(sessions: Sessions) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(sessions, 5), range(8)))

    with sessions() as session:
        verdict = audit.verify(session)
    assert (verdict.intact, verdict.rows) == (True, 40)


@pytest.mark.parametrize("change", TAMPERING)
def test_the_table_refuses_changes(sessions: Sessions, change: str) -> None:
    ids = write(sessions, 3)

    with pytest.raises(IntegrityError, match="append-only"), sessions.begin() as session:
        session.execute(text(TAMPERING[change]), {"id": ids[1]})


@pytest.mark.parametrize("change", TAMPERING)
def test_tampering_shows_where_it_happened(sessions: Sessions, change: str) -> None:
    ids = write(sessions, 5)
    with sessions.begin() as session:
        # The table refuses changes; who owns the database can switch that off, and must be seen all the same.
        session.execute(text("ALTER TABLE audit_event DISABLE TRIGGER USER"))
        session.execute(text(TAMPERING[change]), {"id": ids[2]})

    with sessions() as session:
        verdict = audit.verify(session)
    assert verdict.broken_id == (ids[3] if change == "a removed row" else ids[2])
    assert verdict.rows == 2


def test_an_event_of_a_rolled_back_transaction_leaves_no_hole(sessions: Sessions) -> None:
    write(sessions, 1)
    with sessions() as session:
        audit.record(session, "ada", "test.act", "thing")
        session.rollback()
    write(sessions, 1)

    with sessions() as session:
        assert audit.verify(session).intact
