"""Makes and extends codebooks before the server takes requests; see compaction/warm_up.py."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.codebook.build import COVER_BLOCKS
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.plans import BookLengths, GroupCache, GroupLengths
from vllm_kvcompress.worker.codebook.writer import CodebookWriter
from vllm_kvcompress.worker.compaction.compactor import Compactor
from vllm_kvcompress.worker.compaction.warm_up import compact_nobody, warm_up_length


def warm_up_books(
    writer: CodebookWriter,
    compactor: Compactor,
    configs: Iterable[CompressionConfig],
    block_size: int,
    queries: Mapping[str, torch.Tensor],
) -> None:
    """Code a request that nobody made, and extend its book, once per setting with a codebook.

    `writer` does it for the compactor; other parameters are those of `compaction.warm_up.warm_up`.
    """
    for config in configs:
        if config.codebook is None:
            continue
        length = warm_up_length(config, block_size)
        # The null block is entries, codes and tokens at once. What of it is read means nothing.
        book = BookLengths(block_size, block_size, block_size)
        plans = [
            (
                GroupLengths(length, book.num_slots, book),
                GroupCache(length, ((0, config.num_sink_tokens),)),
            ),
            (
                GroupLengths(length, book.num_slots, book, 1, book.num_slots),
                GroupCache(length, (), replace(book, num_tokens=1)),
            ),
        ]
        _build_books(compactor, config)
        compact_nobody(compactor, config, block_size, queries, plans)
    writer.take_measures()  # nobody's


def _build_books(compactor: Compactor, config: CompressionConfig) -> None:
    """Make books of zeros in every size that the kernels tell apart."""
    assert config.codebook is not None
    build = backend_of(compactor.device).build_codebook
    cache = compactor.layers[0].cache()
    for size in COVER_BLOCKS:
        vectors = cache.new_zeros(1, size, cache.shape[3] // 2)
        counts = torch.full((1,), size, dtype=torch.int32, device=compactor.device)
        for threshold in {config.codebook.key_threshold, config.codebook.value_threshold}:
            build(vectors, counts, threshold, max_entries=1)
