"""The support desk of `examples/support_desk.py`, run as an app runs it, against a real gateway."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from services.platform.postgres import PostgresServer
from services.store import projects
from services.store.models import Feedback
from tests.gateway.parts import eventually, make_world

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_a_correction_typed_at_the_desk_arrives_as_feedback(postgres: PostgresServer) -> None:
    with make_world(postgres) as world:
        world.start_engine()
        world.start_gateway()
        command = [sys.executable, "-m", "examples.support_desk", "May I return a lamp?", "--project", "entities"]
        command += ["--correction", "No: policy 12 gives you 30 days.", "--agent", "desk 3"]
        command += ["--gateway", world.url]
        environment = os.environ | {"DESK_KEY": world.keys["app"]}
        said = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert "told Whet that it was bad, with a correction" in said.stdout

        def stored() -> bool:
            with world.sessions() as session:
                rows = session.scalars(select(Feedback)).all()
                return [(row.rating, row.correction, row.author, row.project_id) for row in rows] == [
                    (-1, "No: policy 12 gives you 30 days.", "desk 3", projects.get(session, "entities").id)
                ]

        eventually(stored)
        talk = [*command[:3], "--project", "entities", "--gateway", world.url]
        typed = "First?\n\nSecond?\n+\n\n"  # nothing is said of the first
        spoken = subprocess.run(
            talk, cwd=ROOT, env=environment, input=typed, capture_output=True, text=True, timeout=60, check=True
        )
        assert spoken.stdout.count("told Whet") == 1

        def praised() -> bool:
            with world.sessions() as session:
                return sorted(session.scalars(select(Feedback.rating))) == [-1, 1]

        eventually(praised)
        refused = environment | {"DESK_KEY": "wh_wrong"}
        failed = subprocess.run(command, cwd=ROOT, env=refused, capture_output=True, text=True, timeout=60, check=False)
        assert failed.returncode == 1
        assert "the desk could not do that" in failed.stderr
