"""How a trainer process is started: plainly, or as several through `accelerate launch` when it has several GPUs.

With several, the worker's child turns into accelerate's launcher, which starts one trainer a GPU. Each dies with the
launcher, and that with the worker; only the first reports and writes.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from worker.training.process import Refused, Trainer, die_with
from worker.training.spec import Report, Spec

MODULE = "worker.training.lora"


def is_wanted(spec: Spec) -> bool:
    """Whether this process is to become the launcher: several devices, and no launcher has started it yet."""
    return spec.devices > 1 and "RANK" not in os.environ


def command(spec: Spec, file: Path, port: int) -> list[str]:
    """What starts `spec.devices` trainers on this machine, whose ranks meet at a loopback port."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(spec.devices),
        "--num_machines", "1", "--machine_rank", "0", "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port), "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "--module", MODULE, "--spec", str(file),
    ]  # fmt: skip


def become(spec: Spec, file: Path) -> NoReturn:
    """Turn into the launcher; being ended with the worker survives the exec. Raises Refused without enough GPUs."""
    import torch

    die_with(spec.parent)
    found = 0 if spec.device == "cpu" else torch.cuda.device_count()
    if found < spec.devices:
        raise Refused(f"devices={spec.devices} needs as many GPUs; torch sees {found} here")
    os.execv(sys.executable, command(spec, file, _free_port()))


def parent_of(spec: Spec) -> int:
    """Whom a trainer dies with: the worker, or the launcher that started it."""
    return os.getppid() if spec.devices > 1 else spec.parent


def only_first(train: Trainer) -> Trainer:
    """The same, silent in every rank but the first."""
    if os.environ.get("RANK", "0") == "0":
        return train

    def quiet(_: Callable[[Report], None]) -> None:
        train(lambda _report: None)

    return quiet


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
