"""Rates of a GPU: how they are written, measured, and put together."""

import math
from pathlib import Path

import pytest

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.speed.machine import (
    MACHINES,
    make_machine,
    parse_bandwidth,
    parse_flops,
    read_measured,
)

HEADER = "kernel,provider,model,tokens,batch,metric,unit,median,p20,p80,note,device"
COPY = "copy,torch,,,,achieved,GB/s,4100,,,,NVIDIA H200"
MATMUL = "matmul,torch,,,,achieved,TFLOP/s,700,,,,NVIDIA H200"


@pytest.mark.parametrize(
    ("text", "rate"),
    [("4.8TB/s", 4.8e12), ("4800 gb/s", 4.8e12), ("4.8e12", 4.8e12), ("5e12B/s", 5e12), ("7", 7)],
)
def test_bandwidths_are_read(text: str, rate: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("990TFLOP/s", 9.9e14), ("990 tflops", 9.9e14), ("0.99PFLOPS/s", 9.9e14), ("990e12", 9.9e14)],
)
def test_flops_are_read(text: str, rate: float) -> None:
    assert parse_flops(text) == pytest.approx(rate)


BAD = [
    "",
    "fast",
    "4.8TB",
    "4.8TiB/s",
    "-1GB/s",
    "0",
    "0TB/s",
    "nan",
    "inf",
    "1e999",
    "4.8 T",
    "1,5",
]


@pytest.mark.parametrize("text", [*BAD, "990TFLOP/s"])
def test_other_bandwidths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a rate above 0; allowed are 4.8TB/s") as caught:
        parse_bandwidth(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [*BAD, "4.8TB/s"])
def test_other_flops_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a rate above 0; allowed are 990TFLOP/s"):
        parse_flops(text)


def measured(folder: Path, *lines: str) -> Path:
    path = folder / "kernels.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


def test_measured_rates(tmp_path: Path) -> None:
    found = read_measured(measured(tmp_path, COPY, MATMUL))
    assert (found.bandwidth, found.flops, found.device) == (4.1e12, 7e14, "NVIDIA H200")
    assert read_measured(measured(tmp_path, COPY)).flops is None


@pytest.mark.parametrize("lines", [[], [MATMUL], ["a,b"], [COPY.replace("achieved", "time")]])
def test_files_without_a_copy(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no line for the bandwidth of a copy.*bench_kernels.py"):
        read_measured(measured(tmp_path, *lines))


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kernels.csv: not a CSV file: field larger"):
        read_measured(measured(tmp_path, "x" * 200_000))


@pytest.mark.parametrize("value", ["", "0", "-3", "nan", "inf", "many"])
def test_measured_rates_must_be_rates(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=f"says '{value}' GB/s of copy; it must be a number"):
        read_measured(measured(tmp_path, COPY.replace("4100", value)))


def test_what_is_given_comes_first(tmp_path: Path) -> None:
    path = measured(tmp_path, COPY, MATMUL)
    machine = make_machine("h100", path, flops=5e14, launch_us=7)
    assert (machine.bandwidth, machine.flops) == (4.1e12, 5e14)
    assert machine.link_bandwidth == 450e9
    assert machine.launch_seconds == pytest.approx(7e-6)
    assert machine.source == (
        "NVIDIA's data sheet of the H100 SXM; bandwidth and FLOP/s measured on NVIDIA H200; "
        "FLOP/s given"
    )
    machine = make_machine(bandwidth=1e12, flops=1e14)
    assert machine.launch_seconds == pytest.approx(5e-6) and math.isinf(machine.link_bandwidth)
    assert machine.source == "bandwidth, FLOP/s given; 5 us per launch assumed"
    assert make_machine("h200").describe().startswith("4,800 GB/s, 989 TFLOP/s, 450 GB/s to other")
    assert make_machine("h200", launch_us=0).launch_seconds == 0


@pytest.mark.parametrize(
    ("given", "missing"),
    [({}, "bandwidth"), ({"bandwidth": 1e12}, "FLOP/s"), ({"flops": 1e14}, "bandwidth")],
)
def test_what_is_missing_is_said(given: dict[str, float], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"--speed: the {missing} of the GPU is missing; give"):
        make_machine(**given)  # type: ignore[arg-type]


def test_a_measured_copy_alone_leaves_the_flops_open(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="FLOP/s of the GPU is missing"):
        make_machine(measured=measured(tmp_path, COPY))
    machine = make_machine("h200", measured(tmp_path, COPY))
    assert (machine.bandwidth, machine.flops) == (4.1e12, MACHINES["h200"].flops)
