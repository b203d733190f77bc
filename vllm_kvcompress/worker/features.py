"""What a mode adds to the worker: hooks that the model runner and the model state call.

Every hook does nothing until a feature overrides it. A mode is a folder with a feature in it and a
line in modes.py; the runner knows none of them by name, and makes only those that the server's
setting asks for.

The hooks in the order of a worker's life:

    before_load, after_load, watch_layer     once
    num_block_tables, writing_bytes          while the KV cache is sized
    bind                                     whenever the KV cache is made
    warm_up                                  once, before the first request
    begin_step, blocks_full_graph, begin_batch, end_batch, report
                                             in every step; the last two behind the forward pass
    compact, after_compaction                between these two, in steps that compact
    trim_drafts                              where the scheduler waits for draft tokens
    reset_row                                whenever a request comes or goes
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.messages import StepPlan
from vllm_kvcompress.plans import GroupLengths
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.working_memory import RankShape


class Feature:
    """One mode of the worker.

    Parameters
    ----------
    runner : CompressionRunnerMixin
        The model runner. It has no model yet, and its model state is vLLM's own.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    # --- before there is one --------------------------------------------------------------

    @staticmethod
    def is_wanted(config: CompressionConfig) -> bool:
        """Whether a server with this setting needs the feature."""
        return True

    # --- set-up ---------------------------------------------------------------------------

    def before_load(self) -> None:
        """Change what must be changed before the model is loaded and memory is profiled."""

    def after_load(self) -> None:
        """The model is loaded, and our model state is in its place."""

    def watch_layer(self, name: str, layer: Any) -> None:
        """Look at one of the target's attention layers, with vLLM's name of it."""

    def num_block_tables(self) -> int:
        """Block tables per KV cache group that it will hold, beside vLLM's."""
        return 0

    def writing_bytes(self, lengths: GroupLengths, shape: RankShape, num_layers: int) -> int:
        """Device memory held at once while one request's survivors are written, from above.

        `num_layers` layers of this rank have these lengths. Survivors that are only copied take
        none.
        """
        return 0

    def bind(self, kv_cache_config: Any) -> None:
        """Take what exists only once the KV cache does. `runner.compactor` has been made."""

    def warm_up(
        self, configs: Sequence[CompressionConfig], block_size: int, samples: Mapping[str, Any]
    ) -> None:
        """Launch once what only its requests launch.

        `configs` are the server's setting and its variants; `samples` has a query [1, H, D] of
        every layer.
        """

    # --- requests -------------------------------------------------------------------------

    def reset_row(self, req_index: int) -> None:
        """A request row starts over, or its request is gone."""

    # --- one step -------------------------------------------------------------------------

    def begin_step(self, step: StepPlan) -> None:
        """Read what the scheduler has sent, before vLLM adds and removes requests."""

    def blocks_full_graph(self, batch_state: Any) -> bool:
        """Whether a batch needs Python in its attention layers, where full CUDA graphs run none.

        `batch_state` is what vLLM's ``gather_batch_req_state`` has found.
        """
        return False

    def begin_batch(self, input_batch: Any, any_compacted: bool) -> None:
        """Prepare a real batch; lengths and slots are known, and whether any request is compacted.

        The metadata of attention is made afterwards.
        """

    def end_batch(self) -> None:
        """The forward pass is over."""

    def compact(self, jobs: Sequence[CompactionJob]) -> None:
        """Do its part of the step's compactions; the compactor has filled all destinations.

        The queries that policies score with are still there, and rows are not rewritten yet.
        """

    def after_compaction(self) -> None:
        """The step's compactions are launched, and not timed any more."""

    def trim_drafts(self, request_ids: Sequence[str], drafts: list[list[int]]) -> list[list[int]]:
        """Shorten the draft tokens of each request, for a scheduler that waits for them."""
        return drafts

    def report(self) -> dict[str, Any]:
        """Fields of the worker's `StepReport`; there is none for what was not measured."""
        return {}

    def late_report(self) -> Sequence[Any]:
        """What can only be read once the step's output is on the host: `fault_report.Late`."""
        return ()


def make_features(
    kinds: Sequence[type[Feature]], config: CompressionConfig, runner: Any
) -> list[Feature]:
    """Features that a setting needs, in the order in which their hooks are called."""
    return [kind(runner) for kind in kinds if kind.is_wanted(config)]
