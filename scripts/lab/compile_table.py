"""Compile every kernel that a preset's warm-up launches, for several GPUs, without one.

    python scripts/lab/compile_table.py --out docs/benchmarks/compile_keys/table.csv

One row per compiled variant: registers per thread, bytes of stack (0: nothing is spilled), shared
memory, and the widest accesses to global memory. Variants that do not depend on the row's type or
head_dim are compiled once and stand in the first row that meets them. Exits with 1 if a variant
spills, needs more shared memory than a block of the GPU can have, or moves rows of a cache in parts
of less than 16 bytes.
"""

import argparse
import csv
import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

# Before vLLM, for which our plugin turns Triton's interpreter on where there is no GPU: from then
# on nothing could be compiled.
for _path in sorted((ROOT / "kernels").rglob("[a-z]*.py")):
    _name = ".".join(_path.relative_to(ROOT).with_suffix("").parts)
    importlib.import_module(f"vllm_kvcompress.{_name}")
from tests.kernels import sm90  # noqa: E402
from tests.kernels.variants import is_bad  # noqa: E402

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends import backends  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.stand_in import Shape, StandIn  # noqa: E402
from vllm_kvcompress.config.reading import parse_config, preset_names  # noqa: E402
from vllm_kvcompress.evaluation.provenance import commit_of, public_words  # noqa: E402

del os.environ["TRITON_INTERPRET"]
backends.pop("cpu", None)  # the interpreter's stand-in, which compiles nothing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MORE = [{"preset": "spindlekv-evict", "policy": {"name": "spindlekv", "selection": "union"}}]
"""Settings beyond the presets that launch variants of their own."""


def widest(accesses: list[str]) -> int:
    """Bytes of the widest of some PTX accesses."""
    sizes = [0]
    for access in accesses:
        if "cp.async" in access:
            sizes.append(16 if ".cg." in access else 8)
            continue
        parts = access.rstrip(";").split(".")
        count = max((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), default=1)
        bits = next((int(part[1:]) for part in reversed(parts) if part[1:].isdigit()), 0)
        sizes.append(count * bits // 8)
    return max(sizes)


class Table:
    """Rows that are written as they come.

    Parameters
    ----------
    path : Path
        The file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        commit = commit_of(ROOT)  # before the file of an earlier run is changed
        self._file = path.open("w", encoding="utf-8", newline="")
        self._file.write(f"# python {' '.join(public_words(sys.argv, ROOT))}\n")
        self._file.write(
            f"# commit {commit}, triton {triton.__version__}, torch {torch.__version__}\n"
        )
        self._writer: Any = None

    def add(self, row: dict[str, Any]) -> None:
        """Write one row."""
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, fieldnames=list(row), lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow(row)
        self._file.flush()
        self.rows.append(row)

    def bad(self) -> list[dict[str, Any]]:
        """Variants that spill, do not fit, or move rows in parts of less than 16 bytes."""
        return [row for row in self.rows if is_bad(row)]


def compile_for(
    target: int, dtypes: list[str], dims: list[int], settings: list[Any], table: Table
) -> None:
    """Compile for one GPU."""
    place: dict[str, Any] = {}

    def record(name: str, kernel: Any) -> None:
        about = sm90.describe(kernel)
        table.add(
            {
                "target": f"sm_{target}", "kernel": name, **place,
                "num_warps": kernel.metadata.num_warps, "registers": about["registers"],
                "stack": about["stack"], "shared": about["shared"],
                "tensor_cores": int(about["mma"]),
                "widest_load": widest(about["loads"]), "widest_store": widest(about["stores"]),
            }
        )  # fmt: skip

    sm90.compile_instead(target, record)
    for dtype in dtypes:
        for dim in dims:
            place = {"dtype": dtype, "head_dim": dim}
            start = time.perf_counter()
            for setting in settings:
                # Two layers: every layer of a model launches the same variants.
                shape = Shape(num_layers=2, head_dim=dim, dtype=DTYPES[dtype], hidden_size=512)
                config = parse_config(setting)
                assert config is not None
                StandIn(config, shape).runner.warm_up_compaction()
            seconds = time.perf_counter() - start
            print(f"sm_{target} {dtype} {dim}: {len(table.rows)} rows, {seconds:.0f} s", flush=True)


def main() -> int:
    """Compile, write the table, and say what does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default="80,90,100")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--head-dims", default="64,96,128,256")
    parser.add_argument("--presets", default=",".join(preset_names()))
    args = parser.parse_args()
    dims = [int(dim) for dim in args.head_dims.split(",")]
    table, run = Table(args.out), JITFunction.run
    for target in map(int, args.targets.split(",")):
        JITFunction.run = run
        settings = [*args.presets.split(","), *MORE]
        compile_for(target, args.dtypes.split(","), dims, settings, table)
    bad = table.bad()
    for row in bad:
        print("spills, does not fit or is narrow:", row)
    print(f"{len(table.rows)} variants, {len(bad)} of them bad; in {args.out}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
