"""Content digests: what a base model and an artefact are called. No torch."""

import hashlib
from pathlib import Path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_digest(directory: Path) -> str:
    """Name of a base model: SHA-256 over the names and digests of config.json and every weight file, sorted by name."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    lines = "".join(f"{file.name} {file_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
