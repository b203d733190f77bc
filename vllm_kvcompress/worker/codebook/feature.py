"""Codebooks as a feature of the worker: rows that have one, who writes them and who reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.plans import GroupLengths
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.codebook.meter import CodebookMeter
from vllm_kvcompress.worker.codebook.reader import CodebookReader, read_codebooks
from vllm_kvcompress.worker.codebook.rows import RequestBooks
from vllm_kvcompress.worker.codebook.warm_up import warm_up_books
from vllm_kvcompress.worker.codebook.working_memory import coding_bytes
from vllm_kvcompress.worker.codebook.writer import CodebookWriter
from vllm_kvcompress.worker.compaction.working_memory import RankShape
from vllm_kvcompress.worker.features import Feature


class CodebookFeature(Feature):
    """Wanted by every server: a request may name a preset with codebooks where the server has none.

    Attributes
    ----------
    books : RequestBooks or None
        Codebooks of all rows; this and the next two are None until the KV cache exists.
    writer : CodebookWriter or None
        Makes and extends them.
    reader : CodebookReader or None
        Attends to them.
    meter : CodebookMeter
        What they were measured by.
    """

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.books: RequestBooks | None = None
        self.writer: CodebookWriter | None = None
        self.reader: CodebookReader | None = None
        self.meter = CodebookMeter(runner.device)

    def watch_layer(self, name: str, layer: Any) -> None:
        read_codebooks(name, layer.impl, lambda: self.reader)

    def writing_bytes(self, lengths: GroupLengths, shape: RankShape, num_layers: int) -> int:
        return coding_bytes(lengths, shape, num_layers)

    def bind(self, kv_cache_config: Any) -> None:
        runner, compactor = self.runner, self.runner.compactor
        num_groups, max_num_reqs = runner.model_state.lengths.evicted.np.shape
        num_kv_heads = compactor.layers[0].cache().shape[1]
        self.books = RequestBooks(num_groups, max_num_reqs, runner.device)
        self.reader = CodebookReader(self.books, compactor.layers, runner.device)
        entry_counts = torch.zeros(
            compactor.num_layers, max_num_reqs, 2, num_kv_heads,
            dtype=torch.int32, device=runner.device,
        )  # fmt: skip
        self.writer = CodebookWriter(
            entry_counts, compactor.all_reduce if compactor.num_ranks > 1 else None
        )
        self.writer.register(compactor)

    def warm_up(
        self,
        configs: Sequence[CompressionConfig],
        block_size: int,
        samples: Mapping[str, torch.Tensor],
    ) -> None:
        if not any(config.codebook for config in configs):
            return
        assert self.reader is not None and self.writer is not None
        self.reader.warm_up(samples)
        queries = {name: sample[0] for name, sample in samples.items()}
        warm_up_books(self.writer, self.runner.compactor, configs, block_size, queries)

    def reset_row(self, req_index: int) -> None:
        if self.books is not None:
            self.books.reset_row(req_index)

    def blocks_full_graph(self, batch_state: Any) -> bool:
        return self.books is not None and self.books.has_book(batch_state.idx_mapping_np)

    def begin_batch(self, input_batch: Any, any_compacted: bool) -> None:
        if not any_compacted:
            return
        assert self.books is not None
        runner, lengths = self.runner, self.runner.model_state.lengths
        tables, block_sizes = runner.tables.tensors, runner.block_tables.block_sizes
        self.books.begin_batch(input_batch, lengths.evicted, tables, block_sizes)
        for group, rows in self.books.rows.items():
            lengths.hide(group, rows.batch_rows)

    def end_batch(self) -> None:
        if self.books is not None:
            self.books.end_batch()

    def compact(self, jobs: Sequence[CompactionJob]) -> None:
        assert self.books is not None
        for job in jobs:
            for group, plan in enumerate(job.plan.groups if not job.plan.purpose.is_view else ()):
                if plan is not None and plan.lengths.book is not None:
                    self.books.set_book(group, job.req_index, plan.lengths.book)

    def after_compaction(self) -> None:
        assert self.writer is not None
        self.meter.add(self.writer.take_measures())

    def report(self) -> dict[str, Any]:
        measures = self.meter.take()
        return {"codebooks": measures} if measures else {}
