"""Lets attention layers read codebooks.

vLLM's kernels know keys and values only. Rows of a batch whose request has a codebook are given to
them as sequences that hold nothing but the query tokens themselves, and what comes out of that is
replaced by attention over codes and ordinary tokens.

Dimensions: R query tokens of requests with a codebook, P blocks of a block table row.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.codebook.pages import CodebookPages, TailPages
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

if TYPE_CHECKING:
    from vllm_kvcompress.worker.codebook.rows import RequestBooks


@dataclass(frozen=True)
class CodedRows:
    """Query tokens of one step whose requests have a codebook, in one KV cache group.

    A request that has one in another group alone is here too: all its tokens are its tail.

    Attributes
    ----------
    batch_rows : np.ndarray
        Numbers of the requests in the batch.
    tokens : torch.Tensor
        [R] int64, places of the query tokens in the batch.
    table : torch.Tensor
        [R, P] int32, block table rows: entries, then codes, then ordinary tokens.
    code_table : torch.Tensor
        [R, P] int32, the same from the first block of codes on.
    num_entries, num_coded, first_slot, num_tail : torch.Tensor
        [R] int32: slots for entries, coded tokens, slots before ordinary tokens, and those of
        them that the query may see.
    max_entries, max_coded, max_tail : int
        At least the largest of them.
    """

    batch_rows: np.ndarray
    tokens: torch.Tensor
    table: torch.Tensor
    code_table: torch.Tensor
    num_entries: torch.Tensor
    num_coded: torch.Tensor
    first_slot: torch.Tensor
    num_tail: torch.Tensor
    max_entries: int
    max_coded: int
    max_tail: int


class CodebookReader:
    """Computes the rows that vLLM's attention cannot.

    Parameters
    ----------
    state : RequestBooks
        Which rows these are.
    layers : iterable of LayerCache
        All layers.
    device : torch.device
        Where they are.
    """

    def __init__(
        self, state: "RequestBooks", layers: Iterable[LayerCache], device: torch.device
    ) -> None:
        self.state = state
        self.layers = {layer.name: layer for layer in layers}
        self.device = device
        self._attend = backend_of(device).codebook_attention

    def attend(self, layer_name: str, query: torch.Tensor, output: torch.Tensor) -> None:
        """Replace rows of the output [T, H, D], or [T, H * D], of one layer in place.

        `query` is [T, H, D] after RoPE; keys and values of the T tokens are in the cache.
        """
        if not self.state.rows:  # nearly always, in every layer
            return
        layer = self.layers[layer_name]
        rows = self.state.rows.get(layer.group)
        if rows is not None:
            self._replace(layer, rows, query, output)

    def _replace(
        self, layer: LayerCache, rows: CodedRows, query: torch.Tensor, output: torch.Tensor
    ) -> None:
        assert layer.rotary is not None, "start-up checks refuse codebooks of models without RoPE"
        cache, layout, head_dim = layer.cache(), layer.layout, query.shape[-1]
        book = CodebookPages(
            entries=Pages(
                keys=cache[..., :head_dim],
                values=cache[..., head_dim:],
                block_table=layout.kernel_table(cache, rows.table),
                num_tokens=rows.num_entries,
                max_tokens=rows.max_entries,
            ),
            codes=cache.view(torch.int16),
            code_table=layout.kernel_table(cache, rows.code_table),
            num_tokens=rows.num_coded,
            max_tokens=rows.max_coded,
        )
        tail = TailPages(
            *layout.pages(cache, rows.table, rows.first_slot, rows.num_tail, rows.max_tail)
        )
        found, _ = self._attend(
            query[rows.tokens],
            book,
            layer.rotary.inv_freq,
            layer.rotary.is_neox,
            layer.scale,
            tail,
            layer.terms,
        )
        output.view(query.shape)[rows.tokens] = found.to(output.dtype)

    def warm_up(self, samples: Mapping[str, torch.Tensor]) -> None:
        """Read a made-up codebook in the null block, so that no request waits for the compiler.

        `samples` has a query [1, H, D] of every layer.
        """
        one = torch.ones(1, dtype=torch.int32).to(self.device)
        tables = one.new_zeros(1, 3)
        rows = CodedRows(
            batch_rows=np.zeros(1, dtype=np.int64),
            tokens=one.long() - 1,
            table=tables,
            code_table=tables,
            num_entries=one,
            num_coded=one - 1,  # of what the null block holds, nothing is followed
            first_slot=one,
            num_tail=one - 1,
            max_entries=1,
            max_coded=1,
            max_tail=1,
        )
        for name, sample in samples.items():
            self._replace(self.layers[name], rows, sample, torch.empty_like(sample))


def read_codebooks(layer_name: str, impl: Any, reader: Callable[[], CodebookReader | None]) -> None:
    """Let one attention layer read codebooks, from when there is a reader.

    There is no hook between a layer and its kernel: see `QueryTaps.watch`, which does the
    same for the same reason. Full CUDA graphs do not come here; batches with codebooks run without.
    """
    forward: Callable[..., torch.Tensor] = impl.forward

    @wraps(forward)
    def attended(
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        found = forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        ours = reader()
        if ours is not None and ours.state.rows:
            ours.attend(layer_name, query, output)
        return found

    impl.forward = attended
