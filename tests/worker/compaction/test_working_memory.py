"""What compactions are said to hold is more than they do hold, and not much more."""

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.policies.cases import CASES
from tests.stand_in import META, Shape, StandIn, jobs_of, replace_launches
from tests.worker.compaction.memory_watch import MemoryWatch
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.codebook.working_memory import coding_bytes
from vllm_kvcompress.worker.compaction import compactor, warm_up, working_memory
from vllm_kvcompress.worker.compaction.compactor import QuerySources
from vllm_kvcompress.worker.compaction.working_memory import RankShape, compaction_bytes

LONGEST = 4096
EVERY = [(name, params) for name, rows in CASES.items() for params in rows]
SLACK = 2**20
"""Constants that do not grow with the tokens: pools of a policy's own, sums over splits."""


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch) -> None:
    replace_launches(monkeypatch, lambda *_: None)
    for module in (compactor, working_memory):
        monkeypatch.setattr(module, "MAX_TOKENS", LONGEST)


def rank_shape(shape: Shape, max_model_len: int = LONGEST) -> RankShape:
    return RankShape(
        shape.num_layers, range(shape.num_layers), shape.num_heads, shape.num_kv_heads,
        shape.head_dim, shape.hidden_size, shape.cache_dtype, shape.block_size, max_model_len,
        shape.max_num_reqs,
    )  # fmt: skip


def measured(config: CompressionConfig, shape: Shape, lengths: list[int]) -> int:
    """Most bytes that a compaction of such prompts holds, beside queries and summaries."""
    model = StandIn(config, shape)
    sample = torch.zeros(shape.num_heads, shape.head_dim, dtype=shape.dtype, device=META)
    own = {layer.name: sample for layer in model.layers}
    kind, taken = config.build_policy().queries, {}
    for length in set(lengths):
        source = warm_up._NoQueries(model.compactor, config, length, own)
        for name in own:
            taken[name, length] = None if kind is Queries.NONE else source.take(None, name)
    # A summary is of its request's prompt; a window's queries are of the same size for all.
    of = {str(row): length for row, length in enumerate(lengths)}
    held: Any = SimpleNamespace(
        take=lambda request, name, *window: taken[name, of.get(request, lengths[0])]
    )
    model.compactor.sources = QuerySources(held, held, held)
    jobs, peaks = jobs_of(model, config, lengths), []
    for each in (jobs, in_place(jobs)):
        gc.collect()
        with MemoryWatch() as watch:
            model.compactor.run(each)
            model.codebooks.writer.take_measures()
        peaks.append(watch.peak)
    return max(peaks)


def in_place(jobs: list[CompactionJob]) -> list[CompactionJob]:
    """The same in a full pool: all destinations are source blocks."""
    found = []
    for job in jobs:
        groups = [
            group
            and replace(
                group,
                destination_blocks=group.source_blocks[-len(group.destination_blocks) :],
                in_place=True,
            )
            for group in job.plan.groups
        ]
        found.append(replace(job, plan=replace(job.plan, groups=tuple(groups))))
    return found


def check(config: CompressionConfig, shape: Shape, most: float) -> None:
    said = compaction_bytes(config, rank_shape(shape), [coding_bytes])
    for own in (config, *config.by_task.values()):
        held = [measured(own, shape, lengths) for lengths in ([LONGEST], [1300, 901, 1024])]
        assert max(held) <= said + SLACK, (held, said)
    assert said <= most * max(held) + SLACK, (held, said)


@pytest.mark.parametrize(("name", "params"), EVERY)
def test_every_policy_holds_what_it_says(name: str, params: dict[str, Any]) -> None:
    """One layer, where nothing but the policy counts."""
    setting = {"policy": {"name": name, **params}, "budget": {"ratio": 0.25}, "min_prompt_len": 0}
    check(parse_config(setting), Shape(num_layers=1), most=6.5)


@pytest.mark.parametrize(
    "name", ["snapkv", "knorm", "criticalkv", "cake", "rkv", "expected_attention"]
)
def test_rows_that_are_copied_out_of_a_cache_of_8_bits_become_float32(name: str) -> None:
    """A policy that copies none, and those that copy keys, values or both."""
    setting = {"policy": {"name": name}, "budget": {"ratio": 0.25}, "min_prompt_len": 0}
    shape = Shape(num_layers=1, eight_bits=torch.float8_e4m3fn)
    check(parse_config(setting), shape, most=6.5)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset(name: str) -> None:
    check(parse_config(name), Shape(num_layers=8), most=4)
