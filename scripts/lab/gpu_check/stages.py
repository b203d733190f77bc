"""The stages, in order of worth: on a GPU, and small ones that rehearse them on a CPU."""

import csv
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.gpu_check import machine
from lab.gpu_check.runner import Stage
from vllm_kvcompress.evaluation.provenance import public_words

Words = tuple[str, ...]

_MODULES = "lab.gpu_check"
NO_COMPILE = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
"""For engines of ``--no-compile``: where torch.compile fails, graphs of decode steps still work."""


@dataclass(frozen=True)
class Options:
    """What stages depend on.

    Attributes
    ----------
    root : pathlib.Path
        The checkout: tests, scripts and the probe model are read from it.
    rehearse : bool
        Small sizes on a CPU.
    no_compile : bool
        Engines without torch.compile.
    commit : str
        Goes into results.
    environment : Mapping[str, str]
        For stages that start engines.
    """

    root: Path
    rehearse: bool
    no_compile: bool = False
    commit: str = "unknown"
    environment: Mapping[str, str] = field(default_factory=dict)


def make_stages(options: Options) -> list[Stage]:
    """All of them."""
    small = options.rehearse
    in_16_bits = "float32" if small else "bfloat16"  # the interpreter's bfloat16 has faults
    gpu_tests = "tests/e2e/test_gpu.py" if small else "tests"
    commit = ("--commit", options.commit)
    kernels: Words = SMALL_KERNELS if small else ("--time-limit", "1000")
    serving: Words = (*(SMALL_SERVING if small else SERVING), *_server_args(options))
    speculation: Words = (*(SMALL_SPECULATION if small else ()), *_engine_args(options))
    engines = options.environment

    def stage(
        name: str, title: str, command: list[str], limits: tuple[int, int], *rest: Any
    ) -> Stage:
        shown = " ".join(["python", *public_words(command[1:], options.root)])
        return Stage(name, title, command, shown, limits[small], *rest)

    stages = [
        stage("machine", "imports, versions, device", _module("machine", "{out}/machine.json"),
              (240, 240), _machine),
        stage("kernels", "kernels against float64", _pytest(options, _kernel_tests(small)),
              (900, 400), junit),
        stage("equality", "engines that must agree, token for token, in float32",
              _engines("equality", "float32", options), (1500, 900), equality, engines),
        stage("equality-bf16", "the same in bfloat16, by the first tokens",
              _engines("equality", in_16_bits, options), (1500, 900), equality, engines),
        stage("models", "windowed layers, latents, 8 bits, recurrent layers: held against stock",
              _module("engines", "models", "{out}", "--dtype", in_16_bits, *_engine_args(options),
                      *["--rehearse"] * small), (1500, 1200), equality, _cpus_own_path(engines)),
        stage("gpu-tests", "tests that need a GPU", _pytest(options, [gpu_tests, "-m", "gpu"]),
              (900, 400), junit),
        stage("sync", "no hidden waits (VLLM_GPU_SYNC_CHECK=error)",
              _engines("sync", in_16_bits, options), (900, 400), sync, engines),
        stage("bench-kernels", "time and bandwidth of kernels",
              _script("bench_kernels", options, kernels + commit),
              (1200, 300), rows_of("kernels.csv")),
        stage("bench-serving", "serving next to stock vLLM, ample and tight pools",
              _script("bench_serving", options, serving),
              (2400, 900), rows_of("serving.csv"), engines),
        stage("bench-speculation", "drafts next to ngram and none",
              _script("bench_speculation", options, speculation),
              (1800, 900), rows_of("speculation.csv"), engines),
    ]  # fmt: skip
    # The same program as `equality`; a rehearsal has nothing to learn from it.
    return [each for each in stages if not (small and each.name == "equality-bf16")]


SERVING: Words = ("--models", "llama-3-8b", "--prompt-lens", "32768", "--rounds", "3")
SMALL_KERNELS: Words = ("--rows", "compact_pages", "--tokens", "256", "--batch", "1")
SMALL_KERNELS += ("--models", "llama-3-8b", "--no-torch", "--time-limit", "120")
SMALL_SERVING: Words = (
    "--preset",
    "cpu",
    "--prompt-lens",
    "640",
    "--output-len",
    "16",
    "--requests",
    "2",
)
SMALL_SERVING += (
    "--pools",
    "tight",
    "--variants",
    "none",
    "0.25",
    "--rounds",
    "1",
    "--warmups",
    "0",
)
SMALL_SPECULATION: Words = (
    "--device",
    "cpu",
    "--prompt-len",
    "560",
    "--output-len",
    "20",
    "--batch",
    "1",
)
SMALL_SPECULATION += ("--rounds", "1")


def _python(*words: str) -> list[str]:
    return [sys.executable, *words]


def _module(name: str, *words: str) -> list[str]:
    return _python("-m", f"{_MODULES}.{name}", *words)


def _pytest(options: Options, words: list[str]) -> list[str]:
    paths = [str(options.root / word) if word.startswith("tests") else word for word in words]
    report = ["--junitxml", "{out}/junit.xml", "--rootdir", str(options.root)]
    return _python("-m", "pytest", "-q", "-p", "no:cacheprovider", *report, *paths)


def _kernel_tests(small: bool) -> list[str]:
    if small:
        names = ("cache/test_store_rows", "compaction/test_select_tokens")
        return [f"tests/kernels/{name}.py" for name in names]
    return ["tests/kernels", "--ignore-glob", "*/test_sm90.py"]  # that one compiles without a GPU


def _engines(what: str, dtype: str, options: Options) -> list[str]:
    model = str(options.root / "examples" / "probe-model")
    words = [what, "{out}", "--model", model, "--dtype", dtype]
    return _module("engines", *words, *_engine_args(options), *["--rehearse"] * options.rehearse)


def _cpus_own_path(environment: Mapping[str, str]) -> dict[str, str]:
    """Of a rehearsal: `lab.gpu_path` computes neither windows nor latents nor 8 bits."""
    kept = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND")
    return {name: environment[name] for name in kept if name in environment}


def _engine_args(options: Options) -> list[str]:
    return ["--engine-args", json.dumps(NO_COMPILE)] if options.no_compile else []


def _server_args(options: Options) -> list[str]:
    if not options.no_compile:
        return []
    return ["--", "-cc.mode=none", "-cc.cudagraph_mode=FULL_DECODE_ONLY"]


def _script(name: str, options: Options, words: Words) -> list[str]:
    path = str(options.root / "scripts" / f"{name}.py")
    return _python(path, "--out", "{out}/results", *words)


# --- one line of each ---------------------------------------------------------------------


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _machine(folder: Path) -> str:
    return machine.summary(_read(folder / "machine.json"))


def junit(folder: Path) -> str:
    """Of a pytest run."""
    try:
        suite = next(ElementTree.parse(folder / "junit.xml").getroot().iter("testsuite"))
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
    counts = {name: int(suite.attrib[name]) for name in ("failures", "errors", "skipped")}
    passed = int(suite.attrib["tests"]) - sum(counts.values())
    said = [f"{passed} passed"] + [f"{count} {name}" for name, count in counts.items() if count]
    broken = [
        case.attrib["name"]
        for case in suite.iter("testcase")
        if any(child.tag in ("failure", "error") for child in case)
    ]
    return ", ".join(said) + (f"; {', '.join(broken[:5])}" if broken else "")


def equality(folder: Path) -> str:
    """Of engines that were compared."""
    found = _read(folder / "equality.json")
    held = [each for each in found["comparisons"] if each["ok"]]
    words = f"{len(held)} of {len(found['comparisons'])} comparisons hold"
    broken = [each["comparison"] for each in found["comparisons"] if each["ok"] is False]
    parts = [words, *(f"not: {name}" for name in broken)]
    not_run = sum(each["ok"] is None for each in found["comparisons"])
    parts += [f"{not_run} not run"] * bool(not_run)
    parts += [f"{name}: {why}" for name, why in found["failed"].items()]
    parts += [f"{name} compressed nothing" for name in found["idle"]]
    parts += [f"{name} skipped: {why}" for name, why in found["skipped"].items()]
    return "; ".join(parts)


def sync(folder: Path) -> str:
    """Of engines under the check for hidden waits."""
    cases = _read(folder / "sync.json")["cases"]
    broken = [f"{name}: {said}" for name, said in cases.items() if said != "ok"]
    return "; ".join([f"{len(cases) - len(broken)} of {len(cases)} engines ran", *broken])


def rows_of(name: str) -> Any:
    """Of a measurement: how much of it there is."""

    def summary(folder: Path) -> str:
        with (folder / "results" / name).open(encoding="utf-8", newline="") as stream:
            lines = [line for line in stream if not line.startswith("#")]
        count = sum(1 for _ in csv.DictReader(lines))
        return f"{count} rows in {folder.name}/results/{name}"

    return summary
