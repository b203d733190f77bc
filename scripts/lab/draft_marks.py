"""Marks in the cache of a draft model, which compression leaves whole: see row_marks.py.

vLLM runs a draft model behind every step of the target: first over the step's tokens that are
valid, the one just sampled and as many more as were turned down, then over one draft at a time.
The first pass must read every token of its request before the step, each once and in order; the
others all that are valid, and the drafts before them. Rows of the token just sampled and of those
turned down count as drafted: the next step writes them, or others, anew.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lab.load_checks import LoadError
from lab.row_codes import DRAFTED, LIMIT, NUM_CHANNELS, Start, compare, encode, wrap
from vllm_kvcompress.worker.latent import cache_of
from vllm_kvcompress.worker.layout.layer_cache import LayerCache


class DraftModelMarks:
    """Marks in all layers of the draft model.

    Parameters
    ----------
    marks : RowMarks
        Those of the target, which knows the step's requests.

    Attributes
    ----------
    num_rows : int
        Rows of one KV head that passes of the draft model have read and that were looked at.
    """

    def __init__(self, marks: Any) -> None:
        self.marks, runner = marks, marks.runner
        self.num_rows = 0
        self._max_len = runner.max_model_len
        self._valid: Sequence[int] = []
        self._pass = 0
        self._tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        modules = runner.vllm_config.compilation_config.static_forward_context
        groups = {
            name: number
            for number, group in enumerate(runner.kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        }
        first = len(runner.compacted_layers)
        for index, name in enumerate(sorted(runner.speculator.draft_attn_layer_names), first):
            module, group = modules[name], groups[name]
            layout = runner._layout(module, runner.block_tables.block_sizes[group])
            layer = LayerCache(name, index, group, 1.0, layout, cache_of(module))
            wrap(module.impl, "do_kv_cache_update", self._write, layer)
            wrap(module.impl, "forward", self._read, layer)
        wrap(runner.speculator, "_run_model", self._run)

    def begin(self, valid: Sequence[int]) -> None:
        """A step's passes begin: so many of the target's tokens are valid, by row of the batch."""
        self._valid, self._pass = valid, 0

    def _run(
        self, own: Callable[..., Any], input_ids: Any, positions: torch.Tensor, metadata: Any,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        batch = self.marks.batch
        if batch is None or metadata is None:
            return own(input_ids, positions, metadata, *args, **kwargs)
        numbers: list[int] = []
        for (each, _, count), valid in zip(batch, self._valid, strict=True):
            if self._pass == 0:
                numbers += [each.number] * valid + [DRAFTED] * (count + 1 - valid)
            else:
                numbers.append(DRAFTED)
        whose = torch.tensor(numbers, device=positions.device)
        self._tokens = whose, positions.long() * (whose != DRAFTED)
        try:
            return own(input_ids, positions, metadata, *args, **kwargs)
        finally:
            self._tokens = None
            self._pass += 1

    def _write(
        self, own: Callable[..., Any], layer: LayerCache, module: Any, key: torch.Tensor,
        value: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self._tokens is not None:
            value = value.clone()
            numbers, positions = self._tokens
            exact = torch.zeros_like(numbers)
            marks = encode(layer.index, numbers, positions, exact, value.shape[1])
            value[: len(numbers), :, :NUM_CHANNELS] = marks.to(value.dtype)
        return own(module, key, value, *args, **kwargs)

    def _read(
        self, own: Callable[..., Any], layer: LayerCache, module: Any, query: Any, key: Any,
        value: Any, kv_cache: torch.Tensor, metadata: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if self._tokens is not None:
            lengths = metadata.seq_lens.tolist()
            try:
                for row, (each, start, count) in enumerate(self.marks.batch):
                    blocks = metadata.block_table[row]
                    self._check(layer, each, start, count, self._valid[row], blocks, lengths[row])
            except LoadError as error:
                self.marks.failures.append(str(error))
        return own(module, query, key, value, kv_cache, metadata, *args, **kwargs)

    def _check(
        self, layer: LayerCache, each: Start, start: int, count: int, valid: int,
        blocks: torch.Tensor, length: int,
    ) -> None:  # fmt: skip
        """A request's rows are all of its tokens, and what is drafted behind them."""
        place = f"{each.name} (start {each.number}), draft model's {layer.name}, pass {self._pass}"
        end = start + valid
        num_drafted = count + 1 - valid if self._pass == 0 else self._pass + 1
        if length != min(end + num_drafted, self._max_len):
            raise LoadError(f"{place}: {length} rows are read instead of {end + num_drafted}")
        marks = self.marks.marks_of(layer, blocks, length)
        rows = each.rows.get(layer.index)
        if self._pass == 0:
            if rows is None:
                rows = self.marks.begun(place, each, layer, marks, start)
            new = torch.arange(start, end, device=rows.device)
            new = (each.number * LIMIT + new) * 2
            rows = torch.cat([rows[:, :start], new.expand(len(rows), valid)], dim=1)
            each.rows[layer.index] = rows
        if rows is None:
            return  # what it has begun with was wrong, and that has been said
        if rows.shape[1] != end:
            raise LoadError(f"{place}: {end} rows are read, {rows.shape[1]} were written")
        drafts = torch.full_like(rows[:, :1], DRAFTED).expand(-1, num_drafted)
        # vLLM puts everything behind the last position of all into its slot.
        count = min(length, self._max_len - 1)
        self.num_rows += len(rows) * count
        marks = {name: found[:, :count] for name, found in marks.items()}
        compare(place, layer.index, marks, torch.cat([rows, drafts], dim=1)[:, :count])
