"""The launches that `plan --speed` counts are those that a real `Compactor` makes.

The compactor runs at full size on torch's meta device: every line of its Python is executed, and
nothing is computed. Launches of kernels are counted instead of made, operators of torch by the same
rule as in the model, copies from the host among them.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from vllm.config.compilation import CUDAGraphMode

from lab.serving.models import MODELS
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.kernels.cache import step_slots
from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.compaction import select_tokens
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.lengths.budgets import (
    compaction_lengths,
    forced_ranges,
    layer_groups,
    permanent_ranges,
)
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import request_usage
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupPlan
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
from vllm_kvcompress.speed.compaction import compaction, heads_of
from vllm_kvcompress.speed.drafting import DRAFT_LAUNCHES, Speculation
from vllm_kvcompress.speed.paths import Path
from vllm_kvcompress.speed.plan import STEP_LAUNCHES
from vllm_kvcompress.speed.scoring import META, OperationCounter, RecordedRows
from vllm_kvcompress.speed.shapes import ModelShape
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources
from vllm_kvcompress.worker.compaction.faults import PendingFlags, StepFaults
from vllm_kvcompress.worker.draft.speculator import ViewSpeculator
from vllm_kvcompress.worker.draft.step import DraftRows, DraftStep
from vllm_kvcompress.worker.draft.views import DraftViews
from vllm_kvcompress.worker.host_mirror import HostMirror
from vllm_kvcompress.worker.layout.layer_cache import LayerCache
from vllm_kvcompress.worker.layout.strided import StridedLayout

SHAPE = ModelShape.from_config(MODELS["llama-3-8b"])
GEOMETRY = ModelGeometry(32, 8, 128, "bfloat16")
BLOCK, TOKENS = 16, 8200  # 512 whole blocks and half of one
FREQUENCIES = Rotary(torch.empty(64, device=META), is_neox=True)


class Sources:
    """Queries of every layer's window, or the policy's summary of all, without data."""

    def __init__(self, config: CompressionConfig) -> None:
        self.config, self.policy = config, config.build_policy()

    def take(self, request: Any, layer: str, *more: int) -> Any:
        def queries(count: int) -> torch.Tensor:
            rows = torch.empty(count, 32, 128, dtype=torch.bfloat16, device=META)
            return rows.transpose(0, 1)

        if self.policy.queries is not Queries.PROMPT:
            return queries(self.config.observation_window)
        rows = RecordedRows(heads_of(SHAPE), TOKENS, TOKENS)
        chunk = ChunkInputs(rows, 0, TOKENS, 4, FREQUENCIES)
        with torch.utils._python_dispatch._disable_current_modes():
            return self.policy.accumulate(None, chunk)


def plan_of(config: CompressionConfig, groups: int) -> CompactionPlan:
    lengths = compaction_lengths(TOKENS, config, groups, BLOCK)
    held = GroupCache(TOKENS, permanent_ranges(TOKENS, config))
    forced = forced_ranges(held, config.observation_window)
    plans = []
    for each in lengths:
        assert each is not None
        source = tuple(range(each.region_len // BLOCK))
        target = tuple(range(1000, 1000 + each.kept_len // BLOCK))
        plans.append(GroupPlan(each, held, forced, source, target, (999,)))
    return CompactionPlan("prompt", TOKENS, False, 0, tuple(plans))


def count_kernels(monkeypatch: Any) -> Counter:
    """Kernels that are launched from now on, by name; none runs."""
    kernels: Counter = Counter()

    def launcher(function: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: kernels.update([function.fn.__name__])

    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "__getitem__", launcher)
    return kernels


def counted(config: CompressionConfig, monkeypatch: Any) -> tuple[Counter, OperationCounter]:
    """Kernels by name, and torch's operators, of one compaction of all layers."""
    kernels = count_kernels(monkeypatch)
    numbers = layer_groups(SHAPE.num_layers, config.layer_groups)
    cache = torch.empty(1100, 8, BLOCK, 256, dtype=torch.bfloat16, device=META)
    layout, sources = StridedLayout(128, BLOCK), Sources(config)
    projection = torch.empty(32, 4096, 128, dtype=torch.bfloat16, device=META)
    layers = [
        LayerCache(
            str(index), index, number, 128**-0.5, layout, lambda: cache,
            rotary=FREQUENCIES, output_projection=lambda: projection,
        )
        for index, number in enumerate(numbers)
    ]  # fmt: skip
    compactor = Compactor(
        layers, SHAPE.num_layers, QuerySources(sources, sources, sources),  # type: ignore[arg-type]
        META, lambda tensor: tensor, 1, 0,
    )  # fmt: skip
    compactor.select_tokens = select_tokens.select_tokens
    compactor.faults = faults = StepFaults(["prompt"], META)
    with OperationCounter(META) as counter:
        compactor.run([CompactionJob(plan_of(config, max(numbers) + 1), config, 0)])
        PendingFlags(faults.request_ids, faults.flags())
    return kernels, counter


def modelled(config: CompressionConfig) -> Path:
    usage = request_usage(GEOMETRY, config, TOKENS, block_size=BLOCK)
    return compaction(SHAPE, config, usage, TOKENS, BLOCK).run


def setting(preset: str) -> CompressionConfig:
    config = parse_config({"preset": preset, "trigger": "end_of_prompt"})
    assert config is not None
    return config.by_task["localization"] if config.tasks else config


PRESETS = ["snapkv", "windowkv", "windowkv_llama3", "keydiff", "lagkv", "tova", "pyramidkv"]
PRESETS += ["adakv", "chunkkv", "cake", "criticalkv", "knorm", "streaming_llm_rerotated", "rkv"]
PRESETS += ["expected_attention", "spindlekv-evict", "random"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_launch_of_a_compaction_is_counted(preset: str, monkeypatch) -> None:
    config = setting(preset)
    kernels, counter = counted(config, monkeypatch)
    model = modelled(config)
    assert sum(kernels.values()) + counter.operations == model.launches, kernels


def test_kernels_by_hand(monkeypatch) -> None:
    """Three launches a layer that is scored, one choice and one copy a layer group."""
    kernels, counter = counted(setting("snapkv"), monkeypatch)
    assert kernels == {
        "_stats_kernel": 32, "_combine_kernel": 32, "_token_kernel": 32,
        "_select_kernel": 1, "_copy_kernel": 1,
    }  # fmt: skip
    # A pooling, a concatenation and a place beside the others a layer; one copy from the host.
    # And whether the scores are numbers: their maximum, four operations on flags, two copies.
    assert counter.operations == 3 * 32 + 1 + 7
    assert modelled(setting("snapkv")).launches == 98 + 97 + 7
    kernels, _ = counted(setting("windowkv_llama3"), monkeypatch)
    assert sum(kernels.values()) == 4 * (3 + 2)
    kernels, _ = counted(setting("keydiff"), monkeypatch)
    assert sum(kernels.values()) == 32 * 2 + 2


def test_a_union_of_heads(monkeypatch) -> None:
    config = parse_config({"preset": "spindlekv-evict", "policy": {"selection": "union"}})
    assert config is not None
    kernels, counter = counted(config, monkeypatch)
    assert sum(kernels.values()) + counter.operations == modelled(config).launches


def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def draft_step(rows: int) -> Any:
    """A draft step of so many rows in one layer group; nothing was evicted since the last."""
    step: Any = DraftStep.__new__(DraftStep)
    step.max_model_len, step._num_padded = 8192, rows
    step.input_ids, step.number = numbers(8, dtype=torch.int32), numbers()
    step.positions, step.slots = numbers(8), numbers(1, 8)
    step.seq_lens, step._lost = numbers(1, 8, dtype=torch.int32), numbers(1, rows)
    step.requests, step.query_start_loc = numbers(8), numbers(9, dtype=torch.int32)
    step._counting, step.has_nan = numbers(9, dtype=torch.int32), numbers(8, dtype=torch.bool)
    table = numbers(8, 512, dtype=torch.int32)
    step.view_tables, step._own_tables = [table], BlockTables.of([table], [BLOCK])
    lengths = SimpleNamespace(evicted=HostMirror((1, 8), META), send=lambda: None)
    step.state = SimpleNamespace(lengths=lengths, views=DraftViews([table], [BLOCK]))
    step._physical_slots = step_slots.physical_slots
    step._rows = DraftRows(numbers(rows), np.arange(rows), numbers(rows), torch.ones(rows).int())
    return step


def test_the_inputs_of_a_draft_step(monkeypatch) -> None:
    """All that `DraftStep.prepare` launches but the backend's metadata, in one layer group."""
    step = draft_step(5)
    monkeypatch.setattr(DraftStep, "_attention", lambda *args: None)
    kernels = count_kernels(monkeypatch)
    with OperationCounter(META) as counter:
        step.prepare(0)
    assert sum(kernels.values()) + counter.operations == 12
    # Before the model's graph; behind it drafts are widened, kept and counted.
    assert DRAFT_LAUNCHES == 12 + 1 + 3


@pytest.mark.parametrize("num_drafts", [1, 4])
def test_all_drafts_of_a_step(num_drafts: int, monkeypatch) -> None:
    """All that `ViewSpeculator` launches for them, graphs of the model among it."""
    rows, graphs = 5, list[Any]()
    made: Any = ViewSpeculator.__new__(ViewSpeculator)
    made.state, made.step = SimpleNamespace(num_draft_steps=num_drafts), draft_step(rows)
    made.device, made.num_drafts, made.num_steps = META, num_drafts, 0
    made.draws, made.min_confidence = False, 0.0
    made.cudagraph_manager = SimpleNamespace(run_fullgraph=graphs.append)
    graph = SimpleNamespace(num_tokens=rows, cg_mode=CUDAGraphMode.FULL)
    monkeypatch.setattr(ViewSpeculator, "_dispatch", lambda *args: graph)
    monkeypatch.setattr(DraftStep, "_attention", lambda *args: None)
    batch: Any = SimpleNamespace(
        num_reqs=rows, req_ids=list("abcde"), idx_mapping=numbers(rows, dtype=torch.int32),
        idx_mapping_np=np.arange(rows), seq_lens=numbers(rows, dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.ones(rows).int(),
    )  # fmt: skip
    drafts, rejected = numbers(8, num_drafts), numbers(rows, dtype=torch.int32)
    none = torch.empty(0)
    kernels = count_kernels(monkeypatch)
    with OperationCounter(META) as counter:
        made._propose(batch, np.arange(rows), drafts, rejected, numbers(8), none, none)
    launches = sum(kernels.values()) + counter.operations + len(graphs)
    assert len(graphs) == num_drafts
    case = Speculation(SHAPE, rows, TOKENS, 0.25, num_drafts)
    assert launches == case.step.launches - case.verify_pass.launches


def test_what_a_step_with_compacted_requests_adds(monkeypatch) -> None:
    """Lengths and slots of four layer groups are a launch each."""
    kernels, groups = count_kernels(monkeypatch), 4
    lengths = torch.empty(8, dtype=torch.int32, device=META)
    evicted = torch.empty(groups, 8, dtype=torch.int32, device=META)
    positions = torch.empty(8, dtype=torch.int64, device=META)
    tables = BlockTables.of([torch.empty(8, 64, dtype=torch.int32, device=META)] * groups, [16] * 4)
    starts, slots = torch.empty(9, dtype=torch.int32, device=META), positions.new_empty(groups, 8)
    with OperationCounter(META) as counter:
        step_slots.physical_seq_lens(lengths, lengths, evicted, evicted)
        step_slots.physical_slots(positions, starts, lengths, evicted, tables, slots)
    assert (sum(kernels.values()), counter.operations) == (STEP_LAUNCHES, 0)
