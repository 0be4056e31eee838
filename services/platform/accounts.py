"""Which operating-system account the embedded servers run as.

Postgres refuses to run as root, so root hands it (and Redis) to a service account. A normal user runs both as itself.
"""

import os
import pwd
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.errors import Unavailable

SERVICE_HOME = Path("/var/lib/whet")
# Tried in this order when `whet` neither exists nor can be created (a container without useradd, for example).
FALLBACKS = ("postgres", "nobody")


@dataclass(frozen=True)
class Account:
    """An entry of the password database."""

    name: str
    uid: int
    gid: int

    @property
    def is_us(self) -> bool:
        """Whether this process already runs as the account."""
        return self.uid == os.geteuid()

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run a short command as this account, output captured. Raises PermissionError when it may not execute it."""
        if self.is_us:
            return subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        return subprocess.run(
            command, cwd="/", capture_output=True, text=True, check=False,
            user=self.uid, group=self.gid, extra_groups=[],
        )  # fmt: skip


def current_account() -> Account:
    """Who runs this process. Raises Unavailable when the user id has no name: peer authentication needs one."""
    try:
        return _from_entry(pwd.getpwuid(os.geteuid()))
    except KeyError:
        raise Unavailable(
            f"user id {os.geteuid()} has no name in the password database, which Postgres needs; "
            "add it there or set DATABASE_URL"
        ) from None


def server_account() -> Account:
    """The account for the embedded servers: ourselves, or as root a service account (created on first use)."""
    if os.geteuid() != 0:
        return current_account()
    account = _find("whet") or _create_whet()
    for name in FALLBACKS:
        account = account or _find(name)
    if account is None:
        raise Unavailable("no unprivileged account for Postgres: run `useradd --system whet`, or set DATABASE_URL")
    return account


def _find(name: str) -> Account | None:
    try:
        return _from_entry(pwd.getpwnam(name))
    except KeyError:
        return None


def _from_entry(entry: pwd.struct_passwd) -> Account:
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _create_whet() -> Account | None:
    useradd = shutil.which("useradd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if useradd is None:
        return None
    command = [useradd, "--system", "--user-group", "--no-create-home", "--home-dir", str(SERVICE_HOME)]
    # Two processes may get here at once; whoever loses finds the account the other one made.
    subprocess.run([*command, "--shell", "/usr/sbin/nologin", "whet"], check=False, capture_output=True)
    return _find("whet")
