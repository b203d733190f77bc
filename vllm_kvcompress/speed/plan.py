"""Time of a request with and without compression, on a machine: what `plan --speed` shows.

Everything is computed from shapes and rates, nothing measured. See `passes`, `compaction` and
`paths` for what is counted; left out everywhere are activations, sampling, the host's own work per
step, waits for the network, and what bandwidth and FLOP/s of a real kernel are below the peak.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.sizing import RequestUsage, capacity
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.speed import kernel_bytes
from vllm_kvcompress.speed.compaction import Compaction, compaction, heads_of
from vllm_kvcompress.speed.drafting import Speculation
from vllm_kvcompress.speed.machine import Machine
from vllm_kvcompress.speed.passes import CHUNK_TOKENS, decode_step, prefill
from vllm_kvcompress.speed.paths import Path, Stage
from vllm_kvcompress.speed.shapes import ModelShape

STEP_LAUNCHES = 2
"""Of a decode step whose batch holds a compacted request, outside its CUDA graph: lengths and slots
of all layer groups (``kernels/cache/step_slots.py``)."""

RING_LAUNCHES = 1
"""Of such a step where a ring keeps queries: their slots. Storing them is inside the graph."""

BOOK_LAUNCHES = 3
"""Of attention in a coded layer with a tail (``kernels/codebook/attention.py``)."""


@dataclass(frozen=True)
class Served:
    """A full batch of requests that come one after the other for ever.

    Attributes
    ----------
    batch : int
        Requests that are decoding at once.
    step_seconds : float
        One step of all of them.
    decode_rate : float
        Output tokens per second while all decode.
    rate : float
        Output tokens per second when each request's prompt and compaction take their time too.
    """

    batch: int
    step_seconds: float
    decode_rate: float
    rate: float


@dataclass(frozen=True)
class SpeedPlan:
    """One setting, one kind of request, one machine.

    Attributes
    ----------
    shape : ModelShape
        One worker's part of the model.
    machine : Machine
        Of each worker.
    config : CompressionConfig
        The setting.
    usage : RequestUsage
        From `request_usage` of the same setting and lengths.
    prompt_len, output_len, block_size : int
        Tokens.
    chunk_tokens : int
        Of a prompt per step.
    """

    shape: ModelShape
    machine: Machine
    config: CompressionConfig
    usage: RequestUsage
    prompt_len: int
    output_len: int
    block_size: int
    chunk_tokens: int = CHUNK_TOKENS

    # --- lengths --------------------------------------------------------------------------

    def _mean(self, tokens: list[int]) -> float:
        """Over layers."""
        sizes = [group.num_layers for group in self.usage.groups]
        return sum(n * size for n, size in zip(tokens, sizes, strict=True)) / sum(sizes)

    @cached_property
    def kept_slots(self) -> float:
        """Slots in use behind the first compaction, mean over layers."""
        return self._mean([group.tokens_after for group in self.usage.groups])

    @cached_property
    def kept_tokens(self) -> float:
        """Tokens attended to behind it, mean over layers."""
        return self._mean([group.tokens_attended for group in self.usage.groups])

    @property
    def tail(self) -> float:
        """Generated tokens in the cache, half way through the output."""
        return self.output_len / 2

    @property
    def compressed_tail(self) -> float:
        """Those of a compressed request, which may give them up every interval."""
        if self.config.compacts_at_intervals:
            return min(self.output_len, self.config.interval) / 2
        return self.tail

    # --- paths ----------------------------------------------------------------------------

    @cached_property
    def prefill(self) -> Path:
        """One prompt."""
        return prefill(self.shape, self.prompt_len, chunk_tokens=self.chunk_tokens)

    @cached_property
    def compaction(self) -> Compaction:
        """Of one request."""
        return compaction(
            self.shape, self.config, self.usage, self.prompt_len, self.block_size,
            self.chunk_tokens,
        )  # fmt: skip

    def stock_step(self, batch: int) -> Path:
        """A decode step without compression."""
        return decode_step(self.shape, batch, self.prompt_len + self.tail)

    def step(self, batch: int) -> Path:
        """A decode step of compacted requests."""
        if self.usage.compacted_at is None:
            return self.stock_step(batch)
        tail = self.compressed_tail
        step = decode_step(
            self.shape, batch, self.kept_slots + tail, attended=self.kept_tokens + tail,
            launches=self._step_launches,
        )  # fmt: skip
        return Path((*step.stages, *self._ring(batch)))

    @property
    def _step_launches(self) -> int:
        coded = sum(
            group.num_layers
            for group in self.usage.groups
            if group.tokens_attended != group.tokens_after
        )
        launches = STEP_LAUNCHES + RING_LAUNCHES * self._keeps_ring
        if not coded:
            return launches + 1  # one full CUDA graph
        # Pieces between attention layers are graphs; attention and the writes to the cache are not.
        layers = self.shape.num_layers
        return launches + (layers + 1) + 2 * layers + BOOK_LAUNCHES * coded

    @property
    def _keeps_ring(self) -> bool:
        reads = self.config.build_policy().queries is not Queries.NONE
        return self.config.compresses_while_decoding and reads

    def _ring(self, batch: int) -> list[Stage]:
        if not self._keeps_ring:
            return []
        kept = kernel_bytes.store_rows(heads_of(self.shape), batch, batch)
        return [Stage("ring", kept.read, kept.written).times(self.shape.num_layers)]

    def drafting(self, batch: int, num_drafts: int | None = None) -> Speculation:
        """Draft mode: the survivors are the view, and the whole cache stays.

        `num_drafts` is `draft.tokens` of the setting where it is not given.
        """
        return Speculation(
            self.shape, batch, self.prompt_len, self.kept_slots / self.prompt_len,
            self.config.draft.tokens if num_drafts is None else num_drafts, self.tail,
        )  # fmt: skip

    # --- what it comes to -----------------------------------------------------------------

    @property
    def evicts(self) -> bool:
        """Whether the setting gives memory back."""
        return self.config.mode == "evict"

    @property
    def can_draft(self) -> bool:
        """Whether the survivors of the setting can be a view to draft over the whole cache."""
        config = self.config
        at_the_end = config.trigger == "end_of_prompt" and config.draft.budget is None
        return at_the_end and config.codebook is None

    def gain(self, batch: int) -> float:
        """Stock's decode step over the compressed one, above 1 where compression is faster."""
        return self.stock_step(batch).seconds(self.machine) / self.step(batch).seconds(self.machine)

    def tokens_to_pay(self, batch: int) -> float | None:
        """Output tokens per request from which on its compaction has paid, by time alone.

        All of a batch's requests are compacted once, then every step of the batch is shorter.

        Returns
        -------
        float or None
            None where a step is no shorter.
        """
        before, after = self.stock_step(batch), self.step(batch)
        saved = before.seconds(self.machine) - after.seconds(self.machine)
        if saved <= 0:
            return None
        return batch * self.compaction.path.seconds(self.machine) / saved

    def needed_length(self, batch: int) -> float:
        """Accepted length from which on draft mode is faster than stock."""
        return self.drafting(batch).needed_length(machine=self.machine)

    def served(self, memory: int, accepted: float | None = None) -> dict[str, Served | None]:
        """Throughput with as many requests as a pool of `memory` bytes per worker holds.

        Returns
        -------
        dict
            "without"; "with" where the setting evicts; "draft" where the survivors can be a view
            and an accepted length is given. None where not one request fits.
        """
        fit, machine = capacity(self.usage, memory), self.machine
        prompt = self.prefill.seconds(machine)
        once = prompt + self.compaction.path.seconds(machine)
        found = {"without": self._served(fit.stock_decoding, self.stock_step, 1.0, prompt)}
        if self.evicts:
            found["with"] = self._served(fit.one_by_one, self.step, 1.0, once)
        if accepted is not None and self.can_draft:

            def step(batch: int) -> Path:
                return self.drafting(batch).step

            found["draft"] = self._served(self._fits_with_views(memory), step, accepted, once)
        return found

    def _served(
        self, batch: int, make_step: Callable[[int], Path], gained: float, once: float
    ) -> Served | None:
        """`gained` tokens per request and step; `once` seconds per request beside its steps."""
        if not batch:
            return None
        step = make_step(batch).seconds(self.machine)
        own = once + self.output_len / gained * step / batch
        return Served(batch, step, batch * gained / step, self.output_len / own)

    def _fits_with_views(self, memory: int) -> int:
        """Requests whose whole caches fit, with a copied view and the drafts' slots each."""
        pool = max(memory // self.usage.stock_block_bytes - 1, 0)
        view = math.ceil(self.kept_slots / self.block_size)
        drafts = -(-self.config.draft.tokens // self.block_size)
        return pool // (self.usage.stock_blocks_decoding + view + drafts)
