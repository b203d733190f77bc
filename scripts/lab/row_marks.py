"""Marks in every row of the cache, and what attention reads held against them.

A debugging switch for an engine in this process: before vLLM writes a token's value to the cache,
some of its channels are overwritten by a mark: which start of which request computed it, at which
place of its sequence, in which layer and KV head. Compactions move rows and marks alike. In every
layer of every step the rows that attention is about to read, by the block tables and lengths that
it is given, must be those that the policy has kept and those that came since, each once and in
order. What a model says under marks means nothing; which rows it reads does not depend on that.

Marks are digits from 0 to 15, which every type of cache holds exactly. Nothing of this is in the
package, so nothing of it is on a server's way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lab.load_checks import LoadError
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.plans import Purpose

DIGITS = {"number": 4, "position": 4, "layer": 2, "head": 2, "lossy": 1}
"""Channels of a value by what they say."""
NUM_CHANNELS = sum(DIGITS.values())
DRAFTED = 0
"""Number of tokens that are drafted: what is verified later overwrites them."""
_LIMIT = 1 << 16


def encode(layer: int, number: torch.Tensor, position: torch.Tensor, lossy: torch.Tensor,
           num_heads: int) -> torch.Tensor:  # fmt: skip
    """Marks [T, KV, NUM_CHANNELS] of tokens whose numbers, positions and flags are [T] int64."""
    heads = torch.arange(num_heads, device=number.device).expand(len(number), num_heads)
    wide = {
        "number": number[:, None].expand_as(heads),
        "position": position[:, None].expand_as(heads),
        "layer": torch.full_like(heads, layer),
        "head": heads,
        "lossy": lossy[:, None].expand_as(heads),
    }
    digits = [
        wide[name] >> 4 * place & 15 for name, count in DIGITS.items() for place in range(count)
    ]
    return torch.stack(digits, dim=-1)


def decode(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the marks of values [KV, n, D] say, [KV, n] int64 each."""
    digits, found, first = values[..., :NUM_CHANNELS].round().long(), {}, 0
    for name, count in DIGITS.items():
        places = torch.arange(count, device=values.device) * 4
        found[name] = (digits[..., first : first + count] << places).sum(dim=-1)
        first += count
    return found


def _codes(marks: dict[str, torch.Tensor]) -> torch.Tensor:
    """[KV, n] int64: who computed a row, where, and over what."""
    return (marks["number"] * _LIMIT + marks["position"]) * 2 + marks["lossy"]


@dataclass
class _Start:
    """One start of a request: a preempted one starts again.

    Attributes
    ----------
    request : Request
        vLLM's, which knows its tokens when it is gone, too.
    num_begun : int
        Tokens that it has found computed.
    lost : dict[int, int]
        Slots given up, by layer.
    rows : dict[int, torch.Tensor]
        By layer, the codes [KV, n] of the rows it should read.
    """

    number: int
    request: Any
    num_begun: int
    lost: dict[int, int]
    rows: dict[int, torch.Tensor] = field(default_factory=dict)
    views: dict[int, torch.Tensor] = field(default_factory=dict)
    is_lossy: bool = False

    @property
    def name(self) -> str:
        return self.request.request_id


class RowMarks:
    """Marks for one engine, for as long as it lives.

    Parameters
    ----------
    engine : Engine
        With compression, idle, and without codebooks: their blocks hold no rows.

    Attributes
    ----------
    num_rows : int
        Rows of one KV head that were read and looked at.
    num_moved : int
        Of these, rows that a compaction has moved.
    failures : list[str]
        What was wrong, the first of each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runner = engine, engine.runner
        self.starts: dict[str, _Start] = {}
        self.known: dict[int, _Start] = {}
        self.num_rows = self.num_moved = self.num_drafts = 0
        self.failures: list[str] = []
        self._batch: list[tuple[_Start, int, int]] | None = None
        self._tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._is_drafting = False
        state = self.runner.model_state
        self._wrap(state, "add_request", self._add_request)
        self._wrap(self.runner, "prepare_attn", self._prepare_attn)
        self._wrap(self.runner.compactor, "_select", self._select)
        if self.runner.speculator is not None and hasattr(self.runner.speculator, "propose"):
            self._wrap(self.runner.speculator, "propose", self._propose)
        layers = self.runner.compacted_layers.by_name()
        for each in self.runner.compactor.layers:
            impl = layers[each.name].impl
            if not hasattr(impl, "do_kv_cache_update"):
                raise SystemExit(f"{type(impl).__name__} writes the cache where no mark can be set")
            self._wrap(impl, "do_kv_cache_update", self._write, each)
            self._wrap(impl, "forward", self._read, each)

    @staticmethod
    def _wrap(owner: Any, name: str, instead: Callable[..., Any], *first: Any) -> None:
        own = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: instead(own, *first, *args, **kwargs))

    def check(self) -> None:
        """Raise what was found since the last call.

        Raises
        ------
        LoadError
            If attention has read a row that it should not have, or missed one.
        """
        if self.failures:
            found, self.failures = self.failures, []
            raise LoadError(f"rows: {found[0]} (and {len(found) - 1} more)")

    # --- requests and batches -------------------------------------------------------------

    def _add_request(self, own: Callable[..., Any], req_index: int, new: Any) -> None:
        state, name = self.runner.model_state, new.req_id
        setup = state.setups.get(name)
        own(req_index, new)
        request = self.engine.scheduler.requests.get(name)
        if request is None:
            return  # a warm-up's, or aborted in the meantime
        evicted = setup.evicted if setup is not None else ()
        numbers = state._groups.layer_groups
        lost = {
            layer.index: evicted[numbers[layer.group]] if evicted else 0
            for layer in self.runner.compactor.layers
        }
        number = len(self.known) + 1
        assert number < _LIMIT, "more requests than marks can tell apart"
        made = _Start(number, request, new.num_computed_tokens, lost, is_lossy=any(evicted))
        self.starts[name] = self.known[number] = made

    def _prepare_attn(self, own: Callable[..., Any], batch: Any) -> Any:
        found = own(batch)
        starts = [self.starts.get(name) for name in batch.req_ids]
        if None in starts:
            self._batch = self._tokens = None
            return found
        ends = batch.query_start_loc[: len(starts) + 1].tolist()
        positions = batch.positions[: ends[-1]].long()
        places = positions.tolist()
        self._batch = [
            (each, places[a], b - a)
            for each, a, b in zip(starts, ends, ends[1:], strict=False)
            if each is not None
        ]
        counts = torch.tensor([count for _, _, count in self._batch])
        numbers = torch.tensor([each.number for each, _, _ in self._batch])
        lossy = torch.tensor([int(each.is_lossy) for each, _, _ in self._batch])
        self._tokens = (
            numbers.repeat_interleave(counts).to(positions.device),
            positions,
            lossy.repeat_interleave(counts).to(positions.device),
        )
        return found

    def _propose(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_drafting = True
        try:
            return own(*args, **kwargs)
        finally:
            self._is_drafting = False

    # --- rows -----------------------------------------------------------------------------

    def _write(
        self, own: Callable[..., Any], layer: Any, module: Any, key: torch.Tensor,
        value: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self._tokens is not None:
            value = value.clone()
            numbers, positions, lossy = self._tokens
            if self._is_drafting:
                numbers = positions = lossy = torch.zeros_like(numbers[:1]).expand(len(value))
            count = len(numbers)
            marks = encode(layer.index, numbers, positions, lossy, value.shape[1])
            value[:count, :, :NUM_CHANNELS] = marks.to(value.dtype)
        return own(module, key, value, *args, **kwargs)

    def _read(
        self, own: Callable[..., Any], layer: Any, module: Any, query: Any, key: Any, value: Any,
        kv_cache: torch.Tensor, metadata: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self._batch is not None and metadata is not None:
            lengths = metadata.seq_lens.tolist()
            try:
                if self._is_drafting:
                    for row, length in enumerate(lengths):
                        self._check_draft(layer, metadata.block_table[row], length)
                else:
                    for row, (each, start, count) in enumerate(self._batch):
                        blocks = metadata.block_table[row]
                        self._check(layer, each, start, count, blocks, lengths[row])
            except LoadError as error:
                self.failures.append(str(error))
        return own(module, query, key, value, kv_cache, metadata, *args, **kwargs)

    def _marks(self, layer: Any, blocks: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        size = self.runner.block_tables.block_sizes[layer.group]
        cache = layer.cache()
        _, values = layer.layout.read(cache, blocks[: -(-length // size)].long())
        return decode(values[:, :length])

    def _check(
        self, layer: Any, each: _Start, start: int, count: int, blocks: torch.Tensor, length: int
    ) -> None:
        """A request's rows [KV, length] are what it should read, with those of this step."""
        place = f"{each.name} (start {each.number}), layer {layer.index}"
        before = start - each.lost[layer.index]
        if length != before + count:
            raise LoadError(f"{place}: {length} rows are read instead of {before + count}")
        marks = self._marks(layer, blocks, length)
        heads = torch.arange(len(marks["head"]), device=blocks.device)[:, None]
        is_place = (marks["layer"] == layer.index) & (marks["head"] == heads)
        if not is_place.all():
            raise LoadError(f"{place}: rows of other layers or heads, or of nobody, are read")
        codes = _codes(marks)
        rows = each.rows.get(layer.index)
        if rows is None:
            rows = codes[:, :before]
            self._check_begun(place, each, {name: m[:, :before] for name, m in marks.items()})
        new = torch.arange(start, start + count, device=codes.device)
        new = (each.number * _LIMIT + new) * 2 + int(each.is_lossy)
        rows = torch.cat([rows[:, :before], new.expand(len(codes), count)], dim=1)
        each.rows[layer.index] = rows
        self.num_rows += codes.numel()
        self.num_moved += before * len(codes) * (each.lost[layer.index] > 0)
        if rows.shape != codes.shape or not torch.equal(rows, codes):
            wrong = (rows != codes).nonzero()[0].tolist()
            found, wanted = (_say(table[tuple(wrong)].item()) for table in (codes, rows))
            raise LoadError(f"{place}, head {wrong[0]}, row {wrong[1]}: {found} not {wanted}")

    def _check_begun(self, place: str, each: _Start, marks: dict[str, torch.Tensor]) -> None:
        """What a request has found computed is of the same tokens; all of them, or survivors."""
        numbers, positions = marks["number"], marks["position"]
        if not numbers.numel():
            return
        if not each.is_lossy:
            wanted = torch.arange(numbers.shape[1], device=numbers.device).expand_as(positions)
            if not torch.equal(positions, wanted) or marks["lossy"].any():
                raise LoadError(f"{place}: a prefix-cache hit is not the prefix, or not exact")
        ordered = positions.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any() or (
            ordered[:, -1] != each.num_begun - 1
        ).any():
            raise LoadError(f"{place}: a continued cache holds a row twice, or lacks the last one")
        own = each.request
        for number in numbers.unique().tolist():
            other = self.known.get(number)
            if other is None:
                raise LoadError(f"{place}: begins with rows of nobody")
            count = int(positions[numbers == number].max()) + 1
            same = list(other.request.all_token_ids[:count]) == list(own.all_token_ids[:count])
            if not same or other.request.cache_salt != own.cache_salt:
                raise LoadError(f"{place}: begins with rows of {other.name}, of other tokens")

    def _check_draft(self, layer: Any, blocks: torch.Tensor, length: int) -> None:
        """What a draft step reads is one request's, each row once, and kept by its last choice."""
        marks = self._marks(layer, blocks, length)
        numbers = marks["number"]
        is_real = numbers != DRAFTED
        if not is_real[:, 0].all():
            return  # a row of padding
        last = int(is_real[0].nonzero()[-1])
        each = self.known.get(int(numbers[0, last]))
        if each is None or not (marks["layer"] == layer.index)[is_real].all():
            raise LoadError(f"layer {layer.index}: a draft reads rows of nobody")
        self.num_drafts += 1
        own, codes, chosen = each.rows[layer.index], _codes(marks), each.views.get(layer.index)
        if chosen is not None:
            if not torch.equal(codes[:, : chosen.shape[1]], chosen):
                raise LoadError(f"{each.name}, layer {layer.index}: a draft reads another view")
            own = torch.cat([own, chosen], dim=1)  # an eviction beside it keeps other tokens
        for head in range(len(codes)):
            seen = codes[head][is_real[head]]
            if len(seen.unique()) < len(seen) or not torch.isin(seen, own[head]).all():
                raise LoadError(f"{each.name}, layer {layer.index}: a draft reads others' rows")

    # --- compactions ----------------------------------------------------------------------

    def _select(self, own: Callable[..., Any], group: Any, layers: Any, scores: Any) -> Any:
        """Note what the policy keeps, in the order in which it is to be written."""
        indices = own(group, layers, scores)
        for place, layer in enumerate(layers):
            work = list(enumerate(zip(group.jobs, group.plans, strict=True)))
            # A view beside an eviction is of the same region.
            work.sort(key=lambda one: one[1][0].plan.purpose is Purpose.EVICT)
            for request, (job, plan) in work:
                each = self.starts.get(job.plan.request_id)
                if each is None or layer.index not in each.rows:
                    continue
                chosen = indices[place, request, :, : plan.lengths.kept_len].long()
                rows = each.rows[layer.index]
                kept = rows[:, : plan.lengths.region_len].gather(1, chosen.to(rows.device))
                if job.plan.purpose is not Purpose.EVICT:
                    each.views[layer.index] = kept
                    continue
                each.rows[layer.index] = torch.cat([kept, rows[:, plan.lengths.region_len :]], 1)
                each.lost[layer.index] += plan.lengths.evicted
                each.is_lossy = True
        return indices


def _say(code: int) -> str:
    number, position = divmod(code // 2, _LIMIT)
    return f"token {position} of start {number}{', computed over a part' if code % 2 else ''}"
