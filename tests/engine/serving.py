"""An engine process for tests: real ZeroMQ, killed for certain at the end."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Served:
    """Where an engine listens, and the process. `restart` starts a fresh one at the same address."""

    model: Path
    artifacts: Path
    directory: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[str] = field(init=False)
    ready: dict[str, object] = field(init=False)

    @property
    def address(self) -> str:
        return f"ipc://{self.directory}/e.sock"

    def start(self) -> None:
        """Run the engine and wait for its ready line."""
        command = [sys.executable, "-m", "engine.process", "--model", str(self.model), "--socket", self.address]
        command += ["--artifacts", str(self.artifacts), "--precision", "fp32", "--threads", "1", *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the engine ended before it was ready"
        self.ready = json.loads(line)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        """Kill and start again."""
        self.kill()
        self.start()


@contextmanager
def served(model: Path, artifacts: Path, *options: str) -> Iterator[Served]:
    """A running engine. Socket paths are limited to about 107 bytes, so it lives in its own short directory."""
    with tempfile.TemporaryDirectory(prefix="whet-e") as directory:
        engine = Served(model, artifacts, Path(directory), options)
        engine.start()
        try:
            yield engine
        finally:
            engine.kill()
