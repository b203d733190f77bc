"""Folders of the checkout, and how other processes find this one."""

import os
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
PROBE_MODEL = ROOT / "examples" / "probe-model"
LOGS = ROOT / ".demo"


def importable(*folders: Path) -> dict[str, str]:
    """PYTHONPATH with which a process that we start can import `lab`.

    Parameters
    ----------
    folders : pathlib.Path
        More of them, that come first.
    """
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = dict.fromkeys([*map(str, folders), str(SCRIPTS), *filter(None, known)])
    return {"PYTHONPATH": os.pathsep.join(path)}


def leave_entry_point(folder: Path, name: str, group: str, target: str) -> None:
    """Write what an installer leaves of a package with one entry point, for a folder on PYTHONPATH.

    Parameters
    ----------
    folder : pathlib.Path
        Made if it is missing.
    name : str
        Of package and entry point.
    group : str
        Such as "vllm.general_plugins".
    target : str
        "module:attribute".
    """
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    project = name.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
