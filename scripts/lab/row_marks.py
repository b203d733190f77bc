"""Marks in every row of the cache, and what attention reads held against them.

A debugging switch for an engine in this process: before vLLM writes a token's value to the cache,
some of its channels are overwritten by a mark: which start of which request computed it, at which
place of its sequence, in which layer and KV head. Compactions move rows and marks alike. In every
layer of every step the rows that attention is about to read, by the block tables and lengths that
it is given, must be those that the policy has kept and those that came since, each once and in
order. Draft steps must read what their request's last view keeps, what came since, and the drafts
before them; and the pass that verifies drafts reads everything that is not evicted. A step begins
behind what its request has had accepted, and no compaction hinges on what is yet to be verified. A
draft model has a cache of its own (draft_marks.py). What a model says under marks means nothing;
which rows it reads does not depend on that.

Marks are digits (row_codes.py). Nothing of this is in the package, so nothing of it is on a
server's way.
"""

from collections.abc import Callable
from typing import Any

import torch

from lab.draft_marks import DraftModelMarks
from lab.load_checks import LoadError
from lab.row_codes import (
    DRAFTED,
    LIMIT,
    NUM_CHANNELS,
    Start,
    codes_of,
    compare,
    decode,
    encode,
    wrap,
)  # fmt: skip
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.plans import Purpose
from vllm_kvcompress.worker.draft.feature import DraftFeature


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
    num_drafted : int
        Rows of one KV head that draft steps have read.
    num_verified : int
        Passes of one layer that verified drafts of a request.
    num_rejected : int
        Drafts that were turned down.
    draft_model : DraftModelMarks or None
        Marks in the draft model's own cache, where there is one.
    batch : list[tuple[Start, int, int]] or None
        Requests of the step, the place of its first token in each, and how many they are.
    failures : list[str]
        What was wrong, the first of each step.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runner = engine, engine.runner
        self.starts: dict[str, Start] = {}
        self.known: dict[int, Start] = {}
        self.num_rows = self.num_moved = self.num_drafted = self.num_verified = 0
        self.num_rejected = 0
        self._chosen: dict[tuple[str, int], torch.Tensor] = {}
        self._written: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        self.failures: list[str] = []
        self.draft_model: DraftModelMarks | None = None
        self.batch: list[tuple[Start, int, int]] | None = None
        self._tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._is_drafting = False
        state = self.runner.model_state
        wrap(state, "add_request", self._add_request)
        wrap(self.runner, "prepare_attn", self._prepare_attn)
        wrap(self.runner.compactor, "_select", self._select)
        wrap(self.runner, "_rewrite_row", self._rewrite_row)
        if self.runner.speculator is not None:
            wrap(self.runner.speculator, "propose", self._propose)
            if self.runner.speculative_config.method == "draft_model":
                self.draft_model = DraftModelMarks(self)
        for feature in self.runner.features:
            if isinstance(feature, DraftFeature):
                wrap(feature.views, "add", self._add_view)
        layers = self.runner.compacted_layers.by_name()
        for each in self.runner.compactor.layers:
            impl = layers[each.name].impl
            if not hasattr(impl, "do_kv_cache_update"):
                raise SystemExit(f"{type(impl).__name__} writes the cache where no mark can be set")
            wrap(impl, "do_kv_cache_update", self._write, each)
            wrap(impl, "forward", self._read, each)

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
        assert number < LIMIT, "more requests than marks can tell apart"
        made = Start(number, request, new.num_computed_tokens, lost, is_lossy=any(evicted))
        self.starts[name] = self.known[number] = made

    def _prepare_attn(self, own: Callable[..., Any], batch: Any) -> Any:
        found = own(batch)
        starts = [self.starts.get(name) for name in batch.req_ids]
        if None in starts:
            self.batch = self._tokens = None
            return found
        ends = batch.query_start_loc[: len(starts) + 1].tolist()
        positions = batch.positions[: ends[-1]].long()
        places = positions.tolist()
        self.batch = [
            (each, places[a], b - a)
            for each, a, b in zip(starts, ends, ends[1:], strict=False)
            if each is not None
        ]
        drafts = batch.num_draft_tokens_per_req
        for row, (each, start, count) in enumerate(self.batch):
            if each.begins not in (None, start):
                place = f"rows of {each.name} (start {each.number})"
                self.failures.append(f"{place}: a step begins at {start} instead of {each.begins}")
            each.begins = start + count
            each.num_certain = each.begins - (0 if drafts is None else int(drafts[row]))
        counts = torch.tensor([count for _, _, count in self.batch])
        numbers = torch.tensor([each.number for each, _, _ in self.batch])
        lossy = torch.tensor([int(each.is_lossy) for each, _, _ in self.batch])
        self._tokens = (
            numbers.repeat_interleave(counts).to(positions.device),
            positions,
            lossy.repeat_interleave(counts).to(positions.device),
        )
        return found

    def _propose(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What was turned down is known by now: vLLM's runner passes it in the seventh place."""
        self._is_drafting = True
        if self.batch is not None:
            rejected = args[6].tolist()
            valid = [n - less for (_, _, n), less in zip(self.batch, rejected, strict=False)]
            self.num_rejected += sum(rejected)
            for (each, start, _), count in zip(self.batch, valid, strict=True):
                each.begins = start + count
            if self.draft_model is not None:
                self.draft_model.begin(valid)
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
        if self.batch is not None and metadata is not None:
            lengths = metadata.seq_lens.tolist()
            try:
                if self._is_drafting:
                    for row, length in enumerate(lengths):
                        self._check_draft(layer, row, metadata.block_table[row], length)
                else:
                    for row, (each, start, count) in enumerate(self.batch):
                        blocks = metadata.block_table[row]
                        self._check(layer, each, start, count, blocks, lengths[row])
            except LoadError as error:
                self.failures.append(str(error))
        return own(module, query, key, value, kv_cache, metadata, *args, **kwargs)

    def marks_of(self, layer: Any, blocks: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        size = self.runner.block_tables.block_sizes[layer.group]
        cache = layer.cache()
        _, values = layer.layout.read(cache, blocks[: -(-length // size)].long())
        return decode(values[:, :length])

    def _check(
        self, layer: Any, each: Start, start: int, count: int, blocks: torch.Tensor, length: int
    ) -> None:
        """A request's rows [KV, length] are what it should read, with those of this step."""
        place = f"{each.name} (start {each.number}), layer {layer.index}"
        before = start - each.lost[layer.index]
        if length != before + count:
            raise LoadError(f"{place}: {length} rows are read instead of {before + count}")
        marks = self.marks_of(layer, blocks, length)
        rows = each.rows.get(layer.index)
        if rows is None:
            rows = self.begun(place, each, layer, marks, before)
        if rows.shape[1] < before:
            raise LoadError(f"{place}: {before} rows are read, {rows.shape[1]} were written")
        new = torch.arange(start, start + count, device=blocks.device)
        new = (each.number * LIMIT + new) * 2 + int(each.is_lossy)
        rows = torch.cat([rows[:, :before], new.expand(len(rows), count)], dim=1)
        each.rows[layer.index] = rows
        self.num_rows += rows.numel()
        self.num_verified += count > 1 and start >= each.request.num_prompt_tokens
        self.num_moved += before * len(rows) * (each.lost[layer.index] > 0)
        compare(place, layer.index, marks, rows)

    def begun(
        self, place: str, each: Start, layer: Any, marks: dict[str, torch.Tensor], count: int
    ) -> torch.Tensor:
        """Codes [KV, count] of what a request has found computed.

        They must be of the same tokens; of all of them, or of survivors.
        """
        marks = {name: found[:, :count] for name, found in marks.items()}
        codes, numbers, positions = codes_of(marks), marks["number"], marks["position"]
        if not count:
            return codes
        compare(place, layer.index, marks, codes)
        if not each.is_lossy:
            wanted = torch.arange(numbers.shape[1], device=numbers.device).expand_as(positions)
            if not torch.equal(positions, wanted) or marks["lossy"].any():
                raise LoadError(f"{place}: a prefix-cache hit is not the prefix, or not exact")
        ordered = positions.sort(dim=1).values
        if (ordered[:, 1:] == ordered[:, :-1]).any() or (
            ordered[:, -1] != each.num_begun - 1
        ).any():
            raise LoadError(f"{place}: a continued cache holds a row twice, or lacks the last one")
        self._check_owners(place, each, numbers, positions)
        return codes

    def _check_owners(
        self, place: str, each: Start, numbers: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Rows of other starts, who may have taken some of them from others still."""
        for number in numbers.unique().tolist():
            self._check_same(place, each, number, int(positions[numbers == number].max()) + 1)

    def _check_same(self, place: str, each: Start, number: int, count: int) -> None:
        """Another start's first tokens are this one's."""
        other, own = self.known.get(number), each.request
        if other is None:
            raise LoadError(f"{place}: begins with rows of nobody")
        same = list(other.request.all_token_ids[:count]) == list(own.all_token_ids[:count])
        if not same or other.request.cache_salt != own.cache_salt:
            raise LoadError(f"{place}: begins with rows of {other.name}, of other tokens")

    def _check_draft(self, layer: Any, row: int, blocks: torch.Tensor, length: int) -> None:
        """What a row of a draft step reads: its view, what came since, the drafts until now."""
        speculator = self.runner.speculator
        number, index = speculator.num_steps, int(speculator.step.requests[row])
        if index < 0:
            return  # padding
        names = {index: name for name, index in self.runner.req_states.req_id_to_index.items()}
        each = self.starts[names[index]]
        place = f"{each.name} (start {each.number}), layer {layer.index}, draft step {number}"
        if layer.index not in each.views:
            raise LoadError(f"{place}: there is no view")
        chosen, behind = each.views[layer.index]
        # The token just sampled has a row that drafts write first.
        num_certain = int(speculator.step.positions[row]) - number - each.lost[layer.index]
        own = each.rows[layer.index]
        if own.shape[1] < num_certain:
            raise LoadError(f"{place}: {num_certain} rows are certain, {own.shape[1]} written")
        drafts = torch.full_like(own[:, :1], DRAFTED).expand(-1, number + 1)
        wanted = torch.cat([chosen, own[:, behind:num_certain], drafts], dim=1)
        if wanted.shape[1] != length:
            raise LoadError(f"{place}: {length} rows are read instead of {wanted.shape[1]}")
        self.num_drafted += wanted.numel()
        compare(place, layer.index, self.marks_of(layer, blocks, length), wanted)

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
                self._check_certain(each, job.plan.position)
                chosen = indices[place, request, :, : plan.lengths.kept_len].long()
                rows = each.rows[layer.index]
                kept = rows[:, : plan.lengths.region_len].gather(1, chosen.to(rows.device))
                if job.plan.purpose is not Purpose.EVICT:
                    self._chosen[each.name, layer.index] = kept
                    continue
                self._written[layer.index, tuple(plan.destination_blocks)] = kept
                self._evict(each, layer.index, plan.lengths, kept)
        return indices

    def _check_certain(self, each: Start, position: int) -> None:
        """A compaction does not hinge on what is yet to be verified."""
        if position > each.num_certain:
            place = f"rows of {each.name} (start {each.number})"
            self.failures.append(
                f"{place}: {position} tokens are compacted, {each.num_certain} are certain"
            )

    @staticmethod
    def _evict(each: Start, layer: int, lengths: Any, kept: torch.Tensor) -> None:
        each.rows[layer] = torch.cat([kept, each.rows[layer][:, lengths.region_len :]], dim=1)
        each.lost[layer] += lengths.evicted
        each.is_lossy = True

    def _rewrite_row(self, own: Callable[..., Any], job: Any) -> None:
        """A request with an equal prompt may take what another's compaction has written."""
        own(job)
        each = self.starts.get(job.plan.request_id)
        if job.plan.purpose is not Purpose.ADOPT or each is None:
            return
        for layer in self.runner.compactor.layers:
            plan = job.plan.groups[layer.group]
            if plan is None or layer.index not in each.rows:
                continue
            kept = self._written.get((layer.index, tuple(plan.destination_blocks)))
            place = f"{each.name} (start {each.number}), layer {layer.index}"
            if kept is None:
                self.failures.append(f"{place}: takes survivors that nobody has written")
                continue
            numbers, positions = kept // 2 // LIMIT, kept // 2 % LIMIT
            self._check_owners(place, each, numbers, positions)
            self._evict(each, layer.index, plan.lengths, kept)

    def _add_view(
        self, own: Callable[..., Any], req_index: int, groups: Any, evicted_with_it: Any = None,
        linked: Any = None,
    ) -> None:  # fmt: skip
        """A row has its view, whose blocks are filled, or some of its own."""
        own(req_index, groups, evicted_with_it, linked)
        names = {index: name for name, index in self.runner.req_states.req_id_to_index.items()}
        each = self.starts.get(names[req_index])
        if each is None:
            return
        for layer in self.runner.compactor.layers:
            rows, plan = each.rows.get(layer.index), groups[layer.group]
            if rows is None:
                continue
            kept = self._chosen.pop((each.name, layer.index), None)
            if plan is None:  # read whole
                each.views[layer.index] = rows[:, :0], 0
                continue
            if linked and layer.group in linked:
                size = self.runner.block_tables.block_sizes[layer.group]
                sources, ids = list(plan.source_blocks), linked[layer.group].tolist()
                places = [slice(n * size, (n + 1) * size) for n in map(sources.index, ids)]
                kept = torch.cat([rows[:, place] for place in places], dim=1)
            assert kept is not None, "a view that nobody has chosen"
            lost = evicted_with_it[layer.group] if evicted_with_it is not None else 0
            each.views[layer.index] = kept, plan.lengths.region_len - lost
