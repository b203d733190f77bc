"""How fast a GPU moves bytes and computes: what people say, data sheets, or a measured copy."""

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_kvcompress.errors import ConfigError

LAUNCH_MICROSECONDS = 5.0
"""Host time per launch where none is given: an assumption, not a measurement."""


@dataclass(frozen=True)
class Machine:
    """Peak rates of one GPU.

    Attributes
    ----------
    bandwidth : float
        Of the device's memory, bytes per second.
    flops : float
        Of matrix products in the model's dtype, per second.
    launch_seconds : float
        Host time per launch.
    link_bandwidth : float
        Bytes per second to other ranks, one direction; infinite where it does not matter.
    source : str
        Where the numbers are from.
    """

    bandwidth: float
    flops: float = math.inf
    launch_seconds: float = 0.0
    link_bandwidth: float = math.inf
    source: str = ""

    def describe(self) -> str:
        """One line for people."""
        link = ""
        if math.isfinite(self.link_bandwidth):
            link = f", {self.link_bandwidth / 1e9:,.0f} GB/s to other ranks"
        return (
            f"{self.bandwidth / 1e9:,.0f} GB/s, {self.flops / 1e12:,.4g} TFLOP/s{link}, "
            f"{self.launch_seconds * 1e6:g} us of host time per launch"
        )


def _sheet(name: str, bandwidth: float, flops: float, link: float) -> Machine:
    return Machine(bandwidth, flops, link_bandwidth=link, source=f"NVIDIA's data sheet of {name}")


# bfloat16 without sparsity. Data sheets give NVLink in both directions together; halved here.
MACHINES = {
    "a100": _sheet("the A100 80GB SXM", 2.039e12, 312e12, 300e9),
    "h100": _sheet("the H100 SXM", 3.35e12, 989e12, 450e9),
    "h200": _sheet("the H200 SXM", 4.8e12, 989e12, 450e9),
    "b200": _sheet("the HGX B200", 8e12, 2250e12, 900e9),
}

_COPY, _MATMUL = ("copy", "achieved", "GB/s"), ("matmul", "achieved", "TFLOP/s")
_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_NUMBER = r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"


def parse_rate(text: str, unit: str, example: str) -> float:
    """A rate as people write it, with a decimal prefix or without a unit.

    Parameters
    ----------
    text : str
        "4.8TB/s", "4800 GB/s", "4.8e12".
    unit : str
        Pattern of the unit behind the prefix.
    example : str
        For the error.

    Raises
    ------
    ConfigError
        If it is none of these, zero, or not finite.
    """
    match = re.fullmatch(rf"{_NUMBER} *(?:([KMGTP]?){unit})?", text.strip(), re.IGNORECASE)
    rate = float(match[1]) * _PREFIXES[(match[2] or "").upper()] if match else 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(f"{text!r} is not a rate above 0; allowed are {example}.")
    return rate


def parse_bandwidth(text: str) -> float:
    """Bytes per second of "4.8TB/s", "4800GB/s" or "4.8e12"; raises like `parse_rate`."""
    return parse_rate(text, "B/s", "4.8TB/s, 4800GB/s or 4.8e12")


def parse_flops(text: str) -> float:
    """FLOPs per second of "990TFLOP/s", "990TFLOPS" or "990e12"; raises like `parse_rate`."""
    return parse_rate(text, "FLOPS?(?:/s)?", "990TFLOP/s, 0.99PFLOP/s or 990e12")


@dataclass(frozen=True)
class Measured:
    """What a file of measurements says.

    Attributes
    ----------
    bandwidth : float
        Bytes per second of a copy, read and written ones counted.
    flops : float or None
        Per second, of a matrix product; None if the file has none.
    device : str
        What they were measured on.
    """

    bandwidth: float
    flops: float | None
    device: str


def read_measured(path: Path) -> Measured:
    """Rates in the ``kernels.csv`` of ``scripts/bench_kernels.py``.

    Raises
    ------
    ConfigError
        If it is no such file, or a rate in it is no number above 0.
    """
    found, device = {}, ""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except csv.Error as error:
        raise ConfigError(f"--measured: {path}: not a CSV file: {error}.") from None
    for row in rows:
        place = row.get("kernel"), row.get("metric"), row.get("unit")
        if place in (_COPY, _MATMUL):
            found[place] = _measured_rate(row, path)
            device = row.get("device") or "a device without a name"
    if _COPY not in found:
        raise ConfigError(
            f"--measured: {path} has no line for the bandwidth of a copy; give the kernels.csv "
            "that scripts/bench_kernels.py writes."
        )
    flops = found[_MATMUL] * 1e12 if _MATMUL in found else None
    return Measured(found[_COPY] * 1e9, flops, device)


def _measured_rate(row: Mapping[str, str], path: Path) -> float:
    try:
        rate = float(row.get("median") or "")
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise ConfigError(
            f"--measured: {path} says {row.get('median')!r} {row['unit']} of {row['kernel']}; it "
            "must be a number above 0."
        )
    return rate


def make_machine(
    name: str | None = None,
    measured: Path | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    link_bandwidth: float | None = None,
    launch_us: float | None = None,
) -> Machine:
    """Put a machine together: what is given comes before what was measured, then the data sheet.

    Raises
    ------
    ConfigError
        If that leaves the bandwidth or the FLOPs open.
    """
    base = MACHINES[name] if name is not None else Machine(math.nan, math.nan)
    sources = [base.source] if name is not None else []
    if measured is not None:
        rates = read_measured(measured)
        what = "bandwidth" if rates.flops is None else "bandwidth and FLOP/s"
        sources.append(f"{what} measured on {rates.device}")
        base = replace(base, bandwidth=rates.bandwidth, flops=rates.flops or base.flops)
    given = {"bandwidth": bandwidth, "FLOP/s": flops, "bandwidth between ranks": link_bandwidth}
    if names := [name for name, value in given.items() if value is not None]:
        sources.append(f"{', '.join(names)} given")
        base = replace(
            base,
            bandwidth=bandwidth or base.bandwidth,
            flops=flops or base.flops,
            link_bandwidth=link_bandwidth or base.link_bandwidth,
        )
    if math.isnan(base.bandwidth) or math.isnan(base.flops):
        missing = "bandwidth" if math.isnan(base.bandwidth) else "FLOP/s"
        raise ConfigError(
            f"--speed: the {missing} of the GPU is missing; give --machine "
            f"({', '.join(MACHINES)}), or --bandwidth (or --measured) and --flops."
        )
    launch = LAUNCH_MICROSECONDS if launch_us is None else launch_us
    if launch_us is None:
        sources.append(f"{launch:g} us per launch assumed")
    return replace(base, launch_seconds=launch * 1e-6, source="; ".join(sources))
