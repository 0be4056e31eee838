"""What was acknowledged is in Postgres exactly once, whoever is killed and wherever."""

import random
import time
from uuid import UUID

import pytest
from sqlalchemy import func, select

from services.gateway.log_spool import LogSpool
from services.store.models import Interaction, InteractionBody
from tests.faults.load import Load
from tests.faults.nursery import Nursery, alive, kill
from tests.gateway.parts import World, eventually
from tests.gateway.test_spool import admitted, final

GATEWAY, SHIPPER = "services.gateway.main", "services.gateway.log_shipper"
KILLS = 20


def stored(world: World) -> dict[UUID, tuple[str, str]]:
    """Finish reason and output of everything in the log."""
    query = select(Interaction.id, Interaction.finish_reason, InteractionBody.output).join(
        InteractionBody, InteractionBody.id == Interaction.id
    )
    with world.sessions.begin() as session:
        rows = session.execute(query).all()
        assert session.scalar(select(func.count()).select_from(Interaction)) == len(rows)
        assert session.scalar(select(func.count()).select_from(InteractionBody)) == len(rows)
    assert len({row.id for row in rows}) == len(rows)
    return {row.id: (row.finish_reason, row.output) for row in rows}


def spool_directories(world: World) -> int:
    return len([path for path in world.settings.spool.iterdir() if path.is_dir() and len(path.name) == 32])


def test_gateway_and_shipper_killed_twenty_times_each_under_load_lose_nothing(doomed: World, nursery: Nursery) -> None:
    chance = random.Random(11)
    victims = {module: nursery.start(doomed, module) for module in (GATEWAY, SHIPPER)}
    order = [GATEWAY] * KILLS + [SHIPPER] * KILLS
    chance.shuffle(order)
    with Load(doomed.url, doomed.keys["app"]) as load:
        eventually(lambda: len(load.seen.texts) > 5)
        for module in order:
            time.sleep(chance.uniform(0.02, 0.15))
            kill(victims[module])
            victims[module] = nursery.start(doomed, module)
            answered = len(load.seen.texts)
            if module == GATEWAY:
                eventually(lambda answered=answered: len(load.seen.texts) > answered)
    kill(victims[GATEWAY])
    eventually(lambda: spool_directories(doomed) == 0, seconds=60)

    rows = stored(doomed)
    seen = load.seen
    assert len(seen.texts) > 2 * KILLS
    assert seen.repeated == []
    missing = [interaction_id for interaction_id in seen.texts if UUID(interaction_id) not in rows]
    assert missing == []
    wrong = [key for key, text in seen.texts.items() if rows[UUID(key)] != ("length", text)]
    assert wrong == []
    assert "interrupted" in {reason for reason, _ in rows.values()}
    assert not (doomed.settings.spool / "quarantine").exists()


@pytest.mark.parametrize("place", ["shipper.before_commit", "shipper.landed", "shipper.placed"])
def test_a_shipper_that_dies_at_any_step_repeats_it_harmlessly(still: World, nursery: Nursery, place: str) -> None:
    spool = LogSpool(still.settings.spool, budget_bytes=1 << 30, segment_bytes=100_000)
    records = [admitted(f"text {index}") for index in range(300)]
    for record in records:
        spool.admit(record)
        spool.finish(final(record))
    spool.close()
    for _ in range(5):
        shipper = nursery.start(still, SHIPPER, WHET_FAILPOINT=place)
        eventually(lambda shipper=shipper: not alive(shipper) or spool_directories(still) == 0)
    shipper = nursery.start(still, SHIPPER)
    eventually(lambda: spool_directories(still) == 0)
    kill(shipper)
    assert stored(still) == {record.id: ("stop", "done") for record in records}


@pytest.mark.parametrize("place", ["gateway.admitted", "gateway.finished"])
def test_a_gateway_that_dies_while_logging_leaves_an_honest_record(doomed: World, nursery: Nursery, place: str) -> None:
    with Load(doomed.url, doomed.keys["app"], clients=1) as load:
        for _ in range(3):
            gateway = nursery.start(doomed, GATEWAY, WHET_FAILPOINT=place)
            eventually(lambda gateway=gateway: not alive(gateway))
    nursery.start(doomed, SHIPPER)
    eventually(lambda: spool_directories(doomed) == 0)
    assert load.seen.texts == {}
    reasons = [reason for reason, _ in stored(doomed).values()]
    assert reasons == ["interrupted" if place == "gateway.admitted" else "length"] * 3
