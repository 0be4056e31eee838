"""Reading an artefact's files: below one root, through no symbolic link, as large as expected, with their digests."""

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
MAX_HEADER_BYTES = 4 << 20
MAX_JSON_BYTES = 1 << 20
# Failures of the machine, not of the artefact.
PASSING = {errno.EIO, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}


class AdapterRefused(ValueError):
    """The artefact cannot be served; the message says why. Nothing was changed."""


class AdapterUnreadable(AdapterRefused):
    """A file could not be read just now, which says nothing about the artefact: it may be tried again."""


def momentary(error: BaseException) -> bool:
    """Whether the same artefact may load the next time: the machine failed, not what it read."""
    if isinstance(error, OSError):
        return error.errno is None or error.errno in PASSING
    # torch says RuntimeError when memory runs out; too deep a nesting is the artefact's fault.
    lacking = isinstance(error, MemoryError | RuntimeError) and not isinstance(error, RecursionError)
    return lacking or isinstance(error, AdapterUnreadable)


def artifact_directory(root: Path, path: str) -> Path:
    """The artefact directory; below the root, reached without symbolic links or `..`."""
    try:
        return _directory(root, path)
    except OSError as error:
        raise _refusal(error, "the artefact path cannot be followed") from error


def _refusal(error: OSError, what: str) -> AdapterRefused:
    kind = AdapterUnreadable if momentary(error) else AdapterRefused
    return kind(f"{what}: {error.strerror}")


def _directory(root: Path, path: str) -> Path:
    given = Path(path)
    if "\0" in path or ".." in given.parts:
        raise AdapterRefused("the artefact path must not contain '..'")
    full = given if given.is_absolute() else root / given
    if not full.is_relative_to(root) or full == root:
        raise AdapterRefused("the artefact path is not below the engine's artefact root")
    here = root
    for part in full.relative_to(root).parts:
        here = here / part
        if here.is_symlink():
            raise AdapterRefused(f"the artefact path goes through a symbolic link: {part}")
    if not full.is_dir():
        raise AdapterRefused(f"there is no artefact directory at {full.relative_to(root)}")
    return full


def verified(path: Path, limit: int, manifest: Mapping[str, Any]) -> bytes:
    """A file's bytes, if they are what the manifest promises."""
    files = manifest.get("files")
    promised = files.get(path.name) if isinstance(files, dict) else None
    raw = read(path, limit)
    if hashlib.sha256(raw).hexdigest() != promised:
        raise AdapterRefused(f"{path.name} does not match the digest in the manifest")
    return raw


def read(path: Path, limit: int) -> bytes:
    """A regular file's bytes, never through a symbolic link."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise AdapterRefused(f"{path.name} is not a regular file")
            if info.st_size > limit:
                raise AdapterRefused(f"{path.name} has {info.st_size} bytes, more than the {limit} this base allows")
            return file.read(limit)
    except OSError as error:
        raise _refusal(error, f"{path.name} cannot be read") from error


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object; `name` is for the complaint."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterRefused(f"{name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterRefused(f"{name} is not a JSON object")
    return value


def header(raw: bytes, name: str = WEIGHTS) -> dict[str, dict[str, Any]]:
    """The safetensors header: tensor name to dtype, shape and offsets; `name` is for the complaint."""
    if len(raw) < 8:
        raise AdapterRefused(f"{name} is truncated")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > MAX_HEADER_BYTES or length > len(raw) - 8:
        raise AdapterRefused(f"{name} is truncated or not a safetensors file")
    entries = json_object(raw[8 : 8 + length], f"the header of {name}")
    entries.pop("__metadata__", None)
    if not all(isinstance(entry, dict) for entry in entries.values()):
        raise AdapterRefused(f"the header of {name} is malformed")
    return entries
