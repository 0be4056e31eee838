"""The home directory and its private parts: who owns what, with which mode."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.errors import Unavailable
from services.platform.accounts import SERVICE_HOME, Account

SOCKET_NAMES = (".s.PGSQL.5432.lock", "redis.sock", "engine.sock")
LONGEST_SOCKET_PATH = 99


def prepare_home(home: Path, sockets: Path, account: Account) -> None:
    """Create the home and its socket directory.

    The socket directory belongs to the servers' account and is closed to everyone else; root passes anyway. So that
    a service account can reach it, root's home may be entered but not listed, and everything private in it has its
    own mode.
    """
    _make_service_home(home)
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700 if account.is_us else 0o711)
    private_directory(sockets, account)
    check_socket_paths(sockets)
    if not account.is_us:
        _check_reachable(sockets, account)
    make_directories(home)


def make_directories(home: Path) -> None:
    """What parts expect to find in the home."""
    for name in ("logs", "artifacts", "spool"):
        (home / name).mkdir(mode=0o700, parents=True, exist_ok=True)


def private_directory(path: Path, account: Account) -> None:
    """Create `path` with mode 0700 for `account`. Refuses a symlink or someone else's directory."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise Unavailable(f"{path} must be a directory, not a link or file")
    if found.st_uid not in {os.geteuid(), account.uid}:
        raise Unavailable(f"{path} belongs to user {found.st_uid}; remove it or choose another directory")
    if found.st_uid != account.uid:
        os.chown(path, account.uid, account.gid)
    path.chmod(0o700)


def check_socket_paths(sockets: Path) -> None:
    """Unix socket paths are cut off at about 107 bytes by the kernel; refuse what comes near."""
    longest = max(len(os.fsencode(sockets / name)) for name in SOCKET_NAMES)
    if longest > LONGEST_SOCKET_PATH:
        raise Unavailable(
            f"the socket directory {sockets} is too long ({longest} bytes with a socket's name, {LONGEST_SOCKET_PATH} "
            "fit): choose a shorter --home or set WHET_RUN_DIR"
        )


def _make_service_home(home: Path) -> None:
    """The default home of root lies below the service directory, which the service account must be able to enter."""
    if os.geteuid() == 0 and SERVICE_HOME in home.parents:
        SERVICE_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)


def _check_reachable(directory: Path, account: Account) -> None:
    if account.run(["/bin/sh", "-c", 'cd "$0"', str(directory)]).returncode != 0:
        raise Unavailable(
            f"run as root, the embedded servers use the account '{account.name}', which cannot enter {directory}: "
            f"choose a home below {SERVICE_HOME} or open its parent directories to passing through (chmod o+x)"
        )


@contextmanager
def temporary_home(prefix: str = "whet-", parent: Path | None = None) -> Iterator[Path]:
    """A short home in `parent`, else among the temporary files; removed at the end. For tests and the demo."""
    home = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        yield home
    finally:
        shutil.rmtree(home)
