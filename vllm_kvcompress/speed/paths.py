"""Work of one path through the device, and how long a machine takes for it at least.

A path is a sequence of stages. A stage takes the longer of its bytes over the bandwidth and its
FLOPs over the peak rate (the roofline), then what it sends to other ranks. Host and device work
side by side: a path takes the longer of its stages' times, one after the other, and its launches
times what the host needs for one. A CUDA graph is one launch, however many kernels it holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_kvcompress.speed.machine import Machine


@dataclass(frozen=True)
class Stage:
    """Work that one limit applies to.

    Attributes
    ----------
    name : str
        For people.
    read, written : float
        Bytes of device memory, as if nothing stayed in a cache between launches.
    flops : float
        Of matrix products.
    launches : int
        Of kernels, copies or graphs, by the host.
    link_bytes : float
        Sent to other tensor-parallel ranks.
    """

    name: str
    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    launches: int = 0
    link_bytes: float = 0.0

    @property
    def num_bytes(self) -> float:
        """Bytes read and written."""
        return self.read + self.written

    def device_seconds(self, machine: Machine) -> float:
        """Least time on the device."""
        limit = max(self.num_bytes / machine.bandwidth, self.flops / machine.flops)
        return limit + self.link_bytes / machine.link_bandwidth

    def times(self, count: int) -> "Stage":
        """The same so many times over."""
        return replace(
            self,
            read=self.read * count,
            written=self.written * count,
            flops=self.flops * count,
            launches=self.launches * count,
            link_bytes=self.link_bytes * count,
        )

    def waits_for_memory(self, machine: Machine) -> bool:
        """Whether bytes take longer than FLOPs."""
        return self.num_bytes / machine.bandwidth > self.flops / machine.flops


@dataclass(frozen=True)
class Path:
    """Stages one after the other."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, paths: "Iterable[Path]") -> "Path":
        """Several paths as one."""
        return cls(tuple(stage for path in paths for stage in path.stages))

    @property
    def read(self) -> float:
        """Bytes read."""
        return sum(stage.read for stage in self.stages)

    @property
    def written(self) -> float:
        """Bytes written."""
        return sum(stage.written for stage in self.stages)

    @property
    def num_bytes(self) -> float:
        """Bytes read and written."""
        return self.read + self.written

    @property
    def flops(self) -> float:
        """FLOPs of matrix products."""
        return sum(stage.flops for stage in self.stages)

    @property
    def launches(self) -> int:
        """Launches by the host."""
        return sum(stage.launches for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def times(self, count: int) -> "Path":
        """The same so many times over."""
        return Path(tuple(stage.times(count) for stage in self.stages))

    def device_seconds(self, machine: Machine) -> float:
        """Least time on the device."""
        return sum(stage.device_seconds(machine) for stage in self.stages)

    def host_seconds(self, machine: Machine) -> float:
        """Time the host takes for the launches."""
        return self.launches * machine.launch_seconds

    def seconds(self, machine: Machine) -> float:
        """Least time: host and device work side by side, so the longer of both."""
        return max(self.device_seconds(machine), self.host_seconds(machine))
