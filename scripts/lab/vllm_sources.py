"""Unpack the Python sources of vLLM 0.33.0, of which no build for a CPU exists.

    export KVCOMPRESS_VLLM_SOURCES="$(python scripts/vllm_sources.py)"
    pytest tests/host/test_host_sources.py

Prints the folder, which is kept in the user's cache (XDG_CACHE_HOME, else ~/.cache); the second
time nothing is fetched. 47 MB are downloaded, and 50 MB of Python files kept. Nothing is built or
installed: `pip download` would ask the sources for their metadata, and so for a compiler and torch.
So pip is asked for the place of the file and for its content alone, with the index, certificates
and credentials that it is set up with.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from lab.errors import RunError

VERSION = "0.33.0"
SHA256 = "f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112"
LIMIT = 300
"""Seconds."""

_DOWNLOAD = """
import sys
from pip._internal.commands import create_command
name, target = sys.argv[1:]
command = create_command("download")
options, _ = command.parse_args(["--retries", "1"])
with command.main_context():
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session)
    links = [each.link for each in finder.find_all_candidates("vllm")]
    link = next((each for each in links if each.filename == name), None)
    if link is None:
        sys.exit("no package index that pip can reach here has it")
    answer = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"})
    answer.raise_for_status()
    with open(target, "wb") as out:
        out.write(answer.content)
"""


def cache_folder() -> Path:
    """Where the sources are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-kvcompress" / f"vllm-{VERSION}-sources"


def fetch(folder: Path | None = None) -> Path:
    """The folder that holds ``vllm/``, fetched first where it is missing.

    Parameters
    ----------
    folder : Path or None
        Where to; None means `cache_folder`.

    Raises
    ------
    RunError
        If the package index cannot be reached or has another file, or there is no room.
    """
    folder = folder or cache_folder()
    if folder.is_dir():  # it gets its name only when it is whole
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
            archive, made = Path(name) / f"vllm-{VERSION}.tar.gz", Path(name) / "sources"
            _download(archive)
            unpack(archive, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise RunError(f"{folder}: {error.strerror or error}.") from None
    return folder


def _download(archive: Path) -> None:
    command = [sys.executable, "-c", _DOWNLOAD, archive.name, str(archive)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise RunError(f"pip could not get {archive.name} within {LIMIT} s.") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = (lines or ["no reason"])[-1].removeprefix("ERROR: ")[:200].rstrip(".")
        raise RunError(f"pip could not get {archive.name}: {reason}.")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RunError(f"{archive.name} is another file than the one that was read.")


def unpack(archive: Path, target: Path) -> None:
    """Write the package's Python files of a source distribution to ``target``/vllm."""
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(member.name)
            if not member.isfile() or path.suffix != ".py" or ".." in path.parts:
                continue
            if len(path.parts) < 3 or path.parts[1] != "vllm":
                continue
            content = files.extractfile(member)
            assert content is not None
            place = target.joinpath(*path.parts[1:])
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())
    if not (target / "vllm" / "__init__.py").is_file():
        raise RunError(f"{archive.name} holds no package vllm.")


def main() -> int:
    """Fetch into the cache, or into the folder that is named."""
    try:
        print(fetch(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
    except RunError as error:
        print(f"vllm_sources: {error}", file=sys.stderr)
        return 1
    return 0
