"""Lets vLLM's Ray executor run CPU workers: a vLLM plugin for processes started with `environment`.

vLLM 0.32 names no Ray resource for CPUs and refuses. Nothing else of its executor asks for a GPU:
Ray is told of two, which it hands out as numbers.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from lab.places import importable, leave_entry_point

ROOT = Path(__file__).parents[2]


def register() -> None:
    """Entry point, called while vLLM looks for its platform, in Ray's workers too."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"


def environment(folder: Path) -> Mapping[str, str]:
    """Environment with the plugin; its metadata is written to `folder`."""
    leave_entry_point(folder, "ray_on_cpu", "vllm.platform_plugins", f"{__name__}:register")
    return {**os.environ, **importable(folder), "RAY_USAGE_STATS_ENABLED": "0"}
