"""Codes survivors of a compaction by codebooks, and extends books by what was generated since.

Books are made per request, layer and KV head; one request's layers of a KV cache group are made
together, as many at a time as `MAX_COPY_BYTES` of survivors allow.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from vllm_kvcompress.kernels.codebook.coded_tokens import (
    CodedTokens,
    Directions,
    Distance,
    code_tokens,
)
from vllm_kvcompress.kernels.compaction.gather_rows import gather_rows
from vllm_kvcompress.plans import GroupPlan, PlanKind
from vllm_kvcompress.worker.batch import GroupBatch
from vllm_kvcompress.worker.codebook.slots import BookSlots
from vllm_kvcompress.worker.compaction.compactor import Compactor
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

MAX_COPY_BYTES = 2**28
"""vLLM has given nearly all memory to its cache by then."""


class CodebookWriter:
    """Fills destination blocks with codebooks.

    Parameters
    ----------
    entry_counts : torch.Tensor or None
        [layers, request rows, 2, num_kv_heads] int32: entries in use, of keys and of values.
        Needed to extend books.
    all_reduce : callable or None
        Sums the measures over tensor-parallel ranks; None where there is one rank.
    slots : BookSlots, optional
        Where codebooks are stored.
    """

    def __init__(
        self,
        entry_counts: torch.Tensor | None,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None,
        slots: BookSlots | None = None,
    ) -> None:
        self.entry_counts, self.all_reduce = entry_counts, all_reduce
        self.slots = slots or BookSlots()
        self._measures: list[torch.Tensor] = []

    def register(self, compactor: Compactor) -> None:
        """Let a compactor have its plans of codebooks carried out here."""
        compactor.writers[PlanKind.CODES] = self.write
        compactor.extenders[PlanKind.MORE_CODES] = self.extend

    def write(self, group: GroupBatch, layers: Sequence[LayerCache], indices: torch.Tensor) -> None:
        """Code the survivors of every request of a group.

        Parameters
        ----------
        group : GroupBatch
            The requests and their blocks.
        layers : sequence of LayerCache
            L layers.
        indices : torch.Tensor
            [L, R, KV, K] int64, survivors. Nothing was evicted before: they are positions too.
        """
        for request, (job, plan) in enumerate(zip(group.jobs, group.plans, strict=True)):
            assert plan.cache.num_tokens == job.plan.position, "indices are positions"
            blocks, count = group.blocks(request), plan.lengths.num_survivors
            for some in self._together(layers, plan, count):
                chosen = [indices[number, request, :, :count] for number, _ in some]
                own_layers = [layer for _, layer in some]
                keys, values = _survivors(own_layers, blocks, chosen)
                self._code(group, request, own_layers, keys, values, torch.cat(chosen), None)

    def extend(self, group: GroupBatch, layers: Sequence[LayerCache]) -> None:
        """Code all full blocks behind every request's codebook."""
        for request, (job, plan) in enumerate(zip(group.jobs, group.plans, strict=True)):
            old, lengths = plan.cache.book, plan.lengths
            assert old is not None and self.entry_counts is not None
            blocks, size = group.blocks(request), lengths.region_len // len(plan.source_blocks)
            held, region = lengths.held_before // size, lengths.region_len // size
            # Behind a book, slots are as far from positions as the sequence is from the cache.
            moved = job.plan.position - plan.cache.num_tokens
            new = torch.arange(
                lengths.held_before + moved, lengths.region_len + moved, device=blocks.device
            )
            for some in self._together(layers, plan, lengths.num_survivors):
                own_layers = [layer for _, layer in some]
                rows = [lay.layout.read(lay.cache(), blocks[held:region]) for lay in own_layers]
                before = [
                    self.slots.load(
                        layer, blocks[:held], old, self.entry_counts[layer.index, job.req_index]
                    )
                    for layer in own_layers
                ]
                keys, values = torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])
                del rows  # else the copies are held while books are made
                positions = new.expand(len(keys), -1)
                self._code(group, request, own_layers, keys, values, positions, _stack(before))

    def _code(
        self,
        group: GroupBatch,
        request: int,
        layers: Sequence[LayerCache],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        old: CodedTokens | None,
    ) -> None:
        """Code new tokens [layers * KV, n, D] and fill their destination blocks."""
        job, book = group.jobs[request], group.plans[request].lengths.book
        config, rotary = job.config.codebook, layers[0].rotary
        assert book is not None and config is not None and rotary is not None
        coded, distances = code_tokens(
            keys, values, positions, rotary,
            (config.key_threshold, config.value_threshold), book.num_entries, old,
        )  # fmt: skip
        destination = group.destination(request)
        for layer, own in zip(layers, _split(coded, len(layers)), strict=True):
            self.slots.store(layer, destination, own, book)
            if self.entry_counts is not None:
                self.entry_counts[layer.index, job.req_index] = own.num_entries.int()
        self._measures.append(torch.stack([_measures(each) for each in distances]))

    def _together(
        self, layers: Sequence[LayerCache], plan: GroupPlan, num_tokens: int
    ) -> Iterator[list[tuple[int, LayerCache]]]:
        """Numbered layers whose books are made at once."""
        numbered = list(enumerate(layers))
        cache = layers[0].cache()
        # Keys and values as they are, turned and as unit vectors of four bytes.
        num_bytes = num_tokens * cache.shape[1] * cache.shape[3] * (2 * cache.element_size() + 4)
        size = max(MAX_COPY_BYTES // num_bytes, 1)
        for start in range(0, len(numbered), size):
            yield numbered[start : start + size]

    def take_measures(self) -> torch.Tensor | None:
        """[2, 4] float64 of all books since the last call, None if there were none.

        Of keys and of values: vectors coded, entries added, vectors without a similar entry, and
        the sum of 1 - cosine over these.
        """
        if not self._measures:
            return None
        total = torch.stack(self._measures).sum(dim=0)
        self._measures = []
        return total if self.all_reduce is None else _all_reduced(total, self.all_reduce)


def _survivors(
    layers: Sequence[LayerCache], blocks: torch.Tensor, chosen: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [layers * KV, n, D] of the tokens chosen in each layer.

    All tokens of the prompt are copied, of one layer at a time; no copy outlives the call.
    """
    keys, values = [], []
    for layer, own in zip(layers, chosen, strict=True):
        rows = layer.layout.read(layer.cache(), blocks)
        keys.append(gather_rows(rows[0], own))
        values.append(gather_rows(rows[1], own))
        del rows  # before the next one is read
    if len(layers) == 1:
        return keys[0], values[0]
    return torch.cat(keys), torch.cat(values)


def _all_reduced(
    numbers: torch.Tensor, all_reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Sum float64 over ranks, of which vLLM's reduction on a CPU takes no wider than float32.

    Counts below 2^40 stay exact for 16 ranks: multiples of 2^20, and what is left of them, are
    whole numbers of 20 bits each.
    """
    high = (numbers / 2**20).floor()
    parts = torch.stack([high, numbers - high * 2**20]).float()
    high, low = all_reduce(parts).double()
    return high * 2**20 + low


def _measures(distance: Distance) -> torch.Tensor:
    vectors = torch.full_like(distance.forced_distance, distance.num_vectors)
    found = (vectors, distance.num_new, distance.num_forced, distance.forced_distance)
    return torch.stack([each.double() for each in found])


def _stack(coded: Sequence[CodedTokens]) -> CodedTokens:
    """The books of several layers as those of one."""

    def together(kinds: Sequence[Directions]) -> Directions:
        return Directions(
            *(
                torch.cat([getattr(each, name) for each in kinds])
                for name in ("entries", "num_entries", "index", "length")
            )
        )

    return CodedTokens(
        together([each.keys for each in coded]),
        together([each.values for each in coded]),
        torch.cat([each.positions for each in coded]),
    )


def _split(coded: CodedTokens, num_layers: int) -> Iterator[CodedTokens]:
    """Inverse of `_stack`."""

    def apart(kind: Directions) -> list[Directions]:
        parts = zip(
            kind.entries.chunk(num_layers), kind.num_entries.chunk(num_layers),
            kind.index.chunk(num_layers), kind.length.chunk(num_layers), strict=True,
        )  # fmt: skip
        return [Directions(*each) for each in parts]

    positions = coded.positions.chunk(num_layers)
    for keys, values, own in zip(apart(coded.keys), apart(coded.values), positions, strict=True):
        yield CodedTokens(keys, values, own)
