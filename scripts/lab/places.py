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
