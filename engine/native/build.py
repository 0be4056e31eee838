"""Compiles the C++ beside this file once per machine and source, with whatever compiler there is; no torch headers.

`python -m engine.native.build` does it ahead of time and says what it found.
"""

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
# Some compilers would not fuse a product and a sum that come from two inlined functions.
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti", "-ffp-contract=fast",
    "-pthread", "-w",
)  # fmt: skip
COMPILE_SECONDS = 300


class NoNative(RuntimeError):
    """The native path cannot be had here; the message says why and what to do. torch's kernels serve instead."""


@cache
def library() -> ctypes.CDLL:
    """The compiled library, from the cache or built now. Raises NoNative."""
    if sys.platform != "linux" or sys.byteorder != "little":
        raise NoNative(f"the native CPU path runs on little-endian Linux, not on {sys.platform}")
    compiler = find_compiler()
    path = _cache_directory() / f"whet-{_fingerprint(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoNative(f"{path} cannot be loaded ({error}); delete it to build it again") from error


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, the system's, or the one of the `ziglang` package. Raises NoNative."""
    if named := os.environ.get("CXX"):
        return tuple(shlex.split(named))
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return sys.executable, "-m", "ziglang", "c++", "-nostdlib++"
    raise NoNative("no C++ compiler: install g++ (apt-get install g++) or the Python package ziglang")


def _cache_directory() -> Path:
    """Ours alone: code is loaded from here, so a directory others could change or swap is refused."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = base / "whet"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        states = directory.stat(), base.stat()
    except (OSError, RuntimeError) as error:
        raise NoNative(f"no directory to build in: {error}; set XDG_CACHE_HOME to one that is yours") from error
    if states[0].st_uid != os.getuid() or states[0].st_mode & 0o022:
        raise NoNative(f"{directory} can be written by others; make it yours alone (chmod 700)")
    if states[1].st_mode & 0o022 and not states[1].st_mode & stat.S_ISVTX:
        raise NoNative(f"others may replace what is in {base}; make it yours alone (chmod 755)")
    return directory


def _fingerprint(compiler: tuple[str, ...]) -> str:
    """Names what the binary depends on: sources, flags, compiler and the processor `-march=native` looked at."""
    digest = hashlib.sha256(repr((FLAGS, compiler, _processor())).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    """Built beside and renamed, so that two starting engines cannot load half a file."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as room:
            draft = Path(room) / path.name
            command = [*compiler, *FLAGS, str(SOURCES / "decoder.cpp"), "-o", str(draft), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
            if done.returncode:
                raise NoNative(f"{compiler[0]} could not build the native path: {done.stderr.strip()[-2000:]}")
            draft.chmod(0o700)
            draft.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoNative(f"{compiler[0]} could not be run in {path.parent}: {error}") from error


def main() -> int:
    """Build it and say for which instructions."""
    try:
        instructions = library().whet_instructions
    except NoNative as error:
        print(f"native CPU path: not available: {error}")
        return 1
    instructions.restype = ctypes.c_char_p
    print(f"native CPU path: ready ({instructions(1).decode()}, {' '.join(find_compiler())})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
