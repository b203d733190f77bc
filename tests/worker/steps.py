"""Every kind of step that a worker makes for compressed requests, on the stand-in device."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode

from tests.stand_in import META, StandIn, batch, jobs_of
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.plans import Purpose
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.worker.draft.linked_blocks import choose_blocks
from vllm_kvcompress.worker.draft.speculator import ViewSpeculator
from vllm_kvcompress.worker.draft.step import DraftStep

ODD_PROMPTS = ([4097], [777, 2003, 3001], [1024])
"""Lengths of prompts that end in one step: no multiple of anything, one alone, unequal ones."""


def prompt_ends(model: StandIn, config: CompressionConfig, lengths: list[int]) -> None:
    """Prompts end in one step, all in two chunks; then they are compacted."""
    policy = config.build_policy()
    for row, length in enumerate(lengths):
        if policy.queries is Queries.WINDOW:
            model.window.add_request(str(row), [length], config.observation_window)
        elif policy.queries is Queries.PROMPT:
            model.prompt.add_request(str(row), policy, length, config.num_sink_tokens)
    first = [(row, 0, length - 3) for row, length in enumerate(lengths)]
    last = [(row, length - 3, 3) for row, length in enumerate(lengths)]
    for rows in (first, last):
        forward(model, rows)
    model.compactor.run(jobs_of(model, config, lengths))
    model.codebooks.writer.take_measures()
    for row in range(len(lengths)):
        model.window.remove_request(str(row))
        model.prompt.remove_request(str(row))


def forward(model: StandIn, rows: list[tuple[int, int, int]]) -> None:
    """What happens around a forward pass: lengths, slots, codebooks, queries."""
    found: Any = batch(rows)
    runner = model.runner
    query = model.query(found.num_tokens)
    for row, *_ in rows:
        model.ring.assign(row, row)
    for source in (model.window, model.prompt, model.ring):
        source.begin_batch(found)
    model.lengths.begin_batch(found)
    model.lengths.group_seq_lens(found)  # as the metadata of full graphs needs it
    runner._physical_slots(
        positions=found.positions, query_start_loc=found.query_start_loc,
        idx_mapping=found.idx_mapping, evicted=model.lengths.evicted.gpu,
        tables=runner.tables, out=runner.block_tables.slot_mappings,
    )  # fmt: skip
    model.codebooks.begin_batch(found, any_compacted=True)
    for layer in model.layers:
        for source in (model.window, model.prompt, model.ring):
            if source.is_active:
                source.record(layer.name, query)
        if model.codebooks.books.rows:
            model.codebooks.reader.attend(layer.name, query, torch.empty_like(query))
    model.codebooks.end_batch()
    model.window.end_batch()
    model.prompt.end_batch()
    model.ring.end_batch()


def decoding(model: StandIn, config: CompressionConfig, lengths: list[int], grown: int) -> None:
    """A compaction so many tokens behind the prompts, and a step that reads what it left."""
    if not (config.compresses_while_decoding or config.extends_codebooks):
        return
    for row in range(len(lengths)):
        model.ring.assign(row, row)
    model.compactor.run(jobs_of(model, config, lengths, grown))
    model.codebooks.writer.take_measures()


def reads_books(model: StandIn, config: CompressionConfig, lengths: list[int]) -> None:
    """Decode steps, one with drafts, of requests whose prompts were coded; one is not."""
    coded = False
    for job in jobs_of(model, config, lengths):
        for group, plan in enumerate(job.plan.groups):
            if plan is not None and plan.lengths.book is not None:
                model.codebooks.books.set_book(group, job.req_index, plan.lengths.book)
                coded = True
    if coded:
        rows = [(row, length + 5, 1 + 3 * (row % 2)) for row, length in enumerate(lengths)]
        forward(model, rows)
        forward(model, [*rows, (len(lengths), 40, 1)])
    for row in range(len(lengths)):
        model.codebooks.reset_row(row)


def drafts(model: StandIn, config: CompressionConfig, lengths: list[int]) -> None:
    """Views, linked ones where the policy allows it, and draft steps over them."""
    linked = config.build_policy().granularity % model.shape.block_size == 0
    purpose = Purpose.LINKED_VIEW if linked else Purpose.COPIED_VIEW
    jobs = jobs_of(model, config, lengths, purpose=purpose)
    policy = config.build_policy()
    if policy.queries is Queries.WINDOW:
        for row, length in enumerate(lengths):
            model.window.add_request(str(row), [length], config.observation_window)
        forward(model, [(row, 0, length) for row, length in enumerate(lengths)])
    if linked:
        blocks = choose_blocks(model.compactor, jobs)
    elif policy.queries is not Queries.PROMPT and config.codebook is None:
        model.compactor.run(jobs)
        blocks = {}
    else:
        return
    for job in jobs:
        own = {group: ids for (name, group), ids in blocks.items() if name == job.plan.request_id}
        model.views.add(job.req_index, job.plan.groups, None, own)
    found: Any = batch([(row, length, 1) for row, length in enumerate(lengths)])
    numbers = torch.zeros(model.shape.max_num_reqs, dtype=torch.int64, device=META)
    drafted = speculator(model).propose(
        found, {}, {}, numbers, None, num_sampled=numbers, num_rejected=numbers,
        last_sampled=numbers[:, None], next_prefill_tokens=numbers, temperature=numbers,
        seeds=numbers,
    )  # fmt: skip
    assert drafted.shape == (len(lengths), 4)
    for row in range(len(lengths)):
        model.views.reset_row(row)


def speculator(model: StandIn) -> ViewSpeculator:
    """Drafts two tokens, greedily, without a model and without vLLM's attention metadata."""
    found: Any = ViewSpeculator.__new__(ViewSpeculator)
    found.device, found.num_drafts, found.min_confidence, found.draws = META, 4, 0.0, False
    found.state = SimpleNamespace(views=model.views, num_draft_steps=2)
    found.step = draft_step(model)
    found.step.run = lambda num_rows, attention: None
    found.drafts = torch.zeros(model.shape.max_num_reqs, 4, dtype=torch.int64, device=META)
    found._num_calls, found._nans = 0, None
    found._broken = np.zeros(model.shape.max_num_reqs, dtype=bool)
    found._dispatch = lambda num_rows: SimpleNamespace(num_tokens=8, cg_mode=CUDAGraphMode.NONE)
    return found


def draft_step(model: StandIn) -> DraftStep:
    """Draft steps without a model, and without vLLM's attention metadata."""
    state = SimpleNamespace(
        config=SimpleNamespace(draft=SimpleNamespace(sample="greedy", min_confidence=0.0)),
        lengths=model.lengths, views=model.views,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=model.shape.max_model_len),
        scheduler_config=SimpleNamespace(max_num_seqs=model.shape.max_num_reqs),
    )
    step = DraftStep(config, None, state, META, None)  # type: ignore[arg-type]
    step._attention = lambda *args: None  # type: ignore[method-assign,assignment]
    step.bind(None, [], model.runner.tables)  # type: ignore[arg-type]
    return step
