"""First stage: is everything there that the later ones need?

python -m lab.gpu_check.machine OUT.json
"""

import importlib
import json
import platform
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

MODULES = {
    "vllm.v1.worker.gpu.model_runner": "engine",
    "vllm.v1.attention.backends.triton_attn": "engine",
    "vllm.entrypoints.openai.api_server": "serving",
    "transformers": "engine",
    "pytest": "kernels, gpu-tests",
    "hypothesis": "kernels",
    "rich": "serving, speculation",
    "httpx": "serving",
    "prometheus_client": "serving",
    "matplotlib": "plots of serving and speculation",
    "psutil": "all",
}
"""What is imported, and which stages need it."""


def look() -> dict[str, Any]:
    """Versions, device, and what cannot be imported."""
    import torch
    import triton

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "missing": {},
    }
    for name, needed_by in MODULES.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # a package may fail in any way of its own
            found["missing"][name] = f"{type(error).__name__}: {error} (needed by {needed_by})"
    if "vllm.v1.worker.gpu.model_runner" not in found["missing"]:
        from vllm.platforms import current_platform

        found["platform"] = type(current_platform).__name__
        found["worker"] = _import_worker(current_platform.is_cpu())
    plugins = [each.name for each in entry_points(group="vllm.general_plugins")]
    found["plugins"] = plugins
    if "kvcompress" not in plugins:
        found["missing"]["entry point"] = (
            "vllm.general_plugins has no kvcompress: install this package"
        )
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["free_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1)
        found["capability"] = f"{properties.major}.{properties.minor}"
    else:
        found["device"] = "cpu"
    return found


def _import_worker(on_cpu: bool) -> str:
    name = f"vllm_kvcompress.worker.{'cpu' if on_cpu else 'gpu'}_worker"
    try:
        importlib.import_module(name)
    except Exception as error:  # as above
        return f"{name} failed: {type(error).__name__}: {error}"
    return "imported"


def summary(found: dict[str, Any]) -> str:
    """One line."""
    words = f"{found['device']}, torch {found['torch']}, triton {found['triton']}"
    missing = ", ".join(found["missing"])
    return f"{words}; missing: {missing}" if missing else words


def main() -> int:
    """Look, write, print; 1 if anything is missing."""
    found = look()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(bool(found["missing"]) or found.get("worker", "") != "imported")


if __name__ == "__main__":
    sys.exit(main())
