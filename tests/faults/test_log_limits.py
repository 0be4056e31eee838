"""A spool without room, and rows that Postgres will not have."""

import json
import time
from uuid import UUID

import httpx
import msgspec
import pytest
from sqlalchemy import select

from services.gateway.log_shipper import Shipper
from services.gateway.log_spool import LogSpool
from services.platform.postgres import PostgresServer
from services.settings import Settings
from services.store.base import Sessions, uuid7
from services.store.models import Interaction
from tests.gateway.parts import eventually, make_world
from tests.gateway.test_spool import admitted, final


def test_a_full_spool_answers_503_until_the_shipper_makes_room_and_loses_nothing(postgres: PostgresServer) -> None:
    bulky = {
        "model": "entities", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2,
        "whet": {"retrieved": ["x" * 50_000]},
    }  # fmt: skip
    with make_world(postgres, WHET_SPOOL_BYTES="1000000") as world:
        world.start_engine()
        world.start_gateway()
        accepted = []
        while (response := world.post("/v1/chat/completions", bulky)).status_code == 200:
            accepted.append(response.json()["id"])
            assert len(accepted) < 30
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "log_spool_full"
        assert httpx.get(f"{world.url}/health").status_code == 503
        assert len(accepted) >= 5

        world.start_shipper()
        for interaction_id in accepted:
            assert world.interaction(interaction_id).interaction.finish_reason == "length"
        eventually(lambda: world.post("/v1/chat/completions", bulky).status_code == 200)


@pytest.fixture
def spool(settings: Settings) -> LogSpool:
    return LogSpool(settings.spool, budget_bytes=1 << 30)


def landed(sessions: Sessions) -> set[object]:
    with sessions.begin() as session:
        return set(session.scalars(select(Interaction.id)))


def ship(shipper: Shipper) -> None:
    while shipper.step():
        pass


def test_poisonous_rows_are_set_aside_and_all_others_land(
    spool: LogSpool, sessions: Sessions, settings: Settings
) -> None:
    good = [admitted(f"text {index}") for index in range(60)]
    poison = admitted("poison")
    for record in [*good[:37], poison, *good[37:]]:
        spool.admit(record)
        too_big = {"completion_tokens": 2**70} if record is poison else {}
        spool.finish(msgspec.structs.replace(final(record), **too_big))
    stranger = msgspec.structs.replace(admitted(), id=UUID(int=1))
    spool.admit(stranger)
    spool.finish(final(stranger))
    spool.close()
    shipper = Shipper(sessions, settings.spool)

    ship(shipper)

    assert landed(sessions) == {record.id for record in good}
    assert (shipper.landed, shipper.quarantined) == (60, 2)
    kept = (settings.spool / "quarantine" / "rows.jsonl").read_text().splitlines()
    assert {"poison", "hello"} <= {word for line in kept for word in ("poison", "hello") if word in line}
    assert all(json.loads(line)["reason"] for line in kept)
    assert not spool.directory.exists()


def test_a_damaged_segment_is_kept_counted_and_what_precedes_it_lands(
    spool: LogSpool, sessions: Sessions, settings: Settings
) -> None:
    before = admitted("before")
    spool.admit(before)
    spool.finish(final(before))
    segment = spool.directory / "00000001.log"
    whole = segment.stat().st_size
    after = admitted("after")
    spool.admit(after)
    spool.finish(final(after))
    spool.close()
    data = bytearray(segment.read_bytes())
    data[whole + 30] ^= 1
    segment.write_bytes(data)
    shipper = Shipper(sessions, settings.spool)

    ship(shipper)

    assert landed(sessions) == {before.id}
    assert shipper.damage.bad_segments == 1
    assert shipper.damage.lost_bytes == len(data) - whole
    (copy,) = (settings.spool / "quarantine").glob("*.log")
    assert copy.read_bytes() == bytes(data)


def test_partitions_appear_for_whatever_day_the_spool_holds(
    spool: LogSpool, sessions: Sessions, settings: Settings
) -> None:
    old = msgspec.structs.replace(admitted(), id=uuid7(time.time() - 20 * 86400))
    spool.admit(old)
    spool.finish(final(old))
    spool.close()
    ship(Shipper(sessions, settings.spool))
    assert landed(sessions) == {old.id}
