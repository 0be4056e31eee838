"""The platform's processes: how each is started, stopped and known to serve. Started by command, never imported."""

import http.client
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from services.platform.accounts import Account
from services.platform.postgres import PostgresServer
from services.platform.process import Part
from services.platform.redis import RedisServer
from services.settings import Settings

# Threads that spin while they wait starve the other torch process on a small machine.
TORCH_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
WORKER_ENVIRONMENT = {**TORCH_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
WORKER_NICE = 10
# Longer than it takes to trip over a missing module or a wrong setting.
SETTLE_SECONDS = 2.5

# Parts stop from the highest stage to the lowest, those of one stage together.
SERVERS, CORE, OUTSIDE = 0, 1, 2


def embedded_postgres(settings: Settings, account: Account) -> PostgresServer | None:
    """The home's own Postgres, unless DATABASE_URL names another."""
    if settings.database_url:
        return None
    return PostgresServer(settings.home / "postgres", settings.sockets, account)


def embedded_redis(settings: Settings, account: Account) -> RedisServer | None:
    """The home's own Redis, unless REDIS_URL names another."""
    if settings.redis_url:
        return None
    return RedisServer(settings.home / "redis", settings.sockets, account)


def commands(settings: Settings) -> dict[str, tuple[str, ...]]:
    """What `whet engine`, `whet gateway` and so on run."""
    python = (sys.executable, "-m")
    return {
        "engine": (*python, "engine.process", *engine_options(settings)),
        "gateway": (*python, "services.gateway.main"),
        "shipper": (*python, "services.gateway.log_shipper"),
        "console": (*python, "services.console.main"),
        "dispatcher": (*python, "worker.dispatcher"),
        "worker": (*python, "worker.main"),
        "trainer": (*python, "worker.main", "--queue=train"),
    }


def engine_options(settings: Settings) -> list[str]:
    """The engine imports nothing of ours, settings included, so it is told everything on its command line."""
    options = {
        "model": settings.model_path,
        "socket": settings.engine_socket,
        "artifacts": settings.artifacts,
        "precision": settings.precision,
        "device": settings.device,
        "threads": settings.engine_threads,
        "kv-tokens": settings.kv_tokens,
        "max-context": settings.max_context,
        "max-running": settings.max_running,
        "step-tokens": settings.step_tokens,
        "adapter-slots": settings.adapter_slots,
        "adapter-rank": settings.adapter_rank,
        "speculator-slots": settings.speculator_slots,
        "speculator-heads": settings.speculator_heads,
        "speculator-vocabulary": settings.speculator_vocabulary,
        "suffix-tokens": settings.suffix_tokens,
    }
    switches = [] if settings.speculation else ["--no-speculation"]
    return [*(f"--{name}={value}" for name, value in options.items()), *switches]


def application(settings: Settings) -> list[Part]:
    """Whet's own processes."""
    run = commands(settings)
    environment = shared_environment(settings)
    engine_socket = Path(settings.engine_socket.removeprefix("ipc://"))
    workers = ("worker", "trainer") if settings.trainer else ("worker",)
    return [
        Part(
            "engine", run["engine"], stage=CORE, environment=environment | TORCH_ENVIRONMENT,
            ready=_accepting(engine_socket), ready_seconds=600,
        ),
        Part("shipper", run["shipper"], stage=CORE, environment=environment, settle_seconds=SETTLE_SECONDS),
        Part("gateway", run["gateway"], stage=OUTSIDE, environment=environment, ready=_healthy(settings.gateway_url)),
        Part("console", run["console"], stage=OUTSIDE, environment=environment, ready=_healthy(_local(settings))),
        Part("dispatcher", run["dispatcher"], stage=OUTSIDE, environment=environment, settle_seconds=SETTLE_SECONDS),
        *(
            Part(
                name, run[name], stage=OUTSIDE, environment=environment | WORKER_ENVIRONMENT, nice=WORKER_NICE,
                grace_seconds=15, settle_seconds=SETTLE_SECONDS,
            )
            for name in workers
        ),
    ]  # fmt: skip


def shared_environment(settings: Settings) -> dict[str, str]:
    """What every part must agree on, options of `whet up` and chosen ports included."""
    return {
        "WHET_HOME": str(settings.home),
        "WHET_RUN_DIR": str(settings.sockets),
        "WHET_MODEL": str(settings.model_path) if Path(settings.model).is_dir() else settings.model,
        "WHET_GATEWAY_PORT": str(settings.gateway_port),
        "WHET_CONSOLE_PORT": str(settings.console_port),
        "PYTHONUNBUFFERED": "1",
    }


def _local(settings: Settings) -> str:
    """The console's own address, also when browsers reach it through a proxy."""
    return settings.model_copy(update={"public_console_url": ""}).console_url


def _accepting(path: Path) -> Callable[[], bool]:
    def ready() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                return False
        return True

    return ready


def _healthy(url: str) -> Callable[[], bool]:
    address = urlsplit(url)

    def ready() -> bool:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    return ready
