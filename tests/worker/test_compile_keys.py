"""What a request launches, the warm-up has compiled: no request waits for Triton's compiler."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.stand_in import META, Shape, StandIn, replace_launches
from tests.worker import steps
from tests.worker.compile_keys import CompileKeys, unseen
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.kernels.compaction.select_tokens import select_tokens

LLAMA = Shape(num_layers=6)
"""Llama-3-8B's, but for the number of layers, and of no more groups than the presets cut."""

ODD = Shape(
    num_layers=5, num_heads=21, num_kv_heads=7, head_dim=96, hidden_size=2016, dtype=torch.float16,
    block_size=32, max_model_len=4301, max_num_reqs=101, max_num_tokens=6001,
)  # fmt: skip
"""Sizes of a model and a server that are multiples of as little as may be."""


@pytest.fixture
def keys(monkeypatch) -> CompileKeys:
    found = CompileKeys()
    replace_launches(monkeypatch, found.record)
    # Books of a few hundred tokens are made one part after the other, as those of many would be.
    monkeypatch.setattr("vllm_kvcompress.kernels.codebook.coded_tokens.MAX_GRAPH_BYTES", 2**15)
    return found


def run(model: StandIn) -> None:
    """Steps of every kind, with lengths that are multiples of nothing and of everything."""
    for config in model.configs:
        for lengths in steps.ODD_PROMPTS:
            steps.prompt_ends(model, config, lengths)
        for lengths in ([777, 2003], [1025]):
            steps.decoding(model, config, lengths, 130)
        for lengths in ([777, 2003, 3001], [1024]):
            steps.reads_books(model, config, lengths)
        for lengths in ([777, 2003, 3001], [1025]):
            steps.drafts(model, config, lengths)


def check(keys: CompileKeys, setting: str | dict[str, Any], shape: Shape) -> None:
    model = StandIn(parse_config(setting), shape)
    model.runner.warm_up_compaction()
    warmed = keys.take()
    run(model)
    launched = keys.take()
    assert launched.keys() >= {"_seq_lens_kernel", "_slots_kernel", "_select_kernel"}
    assert unseen(launched, warmed) == []


@pytest.mark.parametrize("name", preset_names())
def test_a_run_launches_what_the_warm_up_has_compiled(keys: CompileKeys, name: str) -> None:
    check(keys, name, LLAMA)


@pytest.mark.parametrize("name", ["spindlekv", "windowkv_llama3", "keydiff", "lagkv", "snapkv"])
def test_sizes_that_are_multiples_of_nothing(keys: CompileKeys, name: str) -> None:
    check(keys, name, ODD)


@pytest.mark.parametrize("name", ["snapkv", "tova", "pyramidkv", "rkv", "cake"])
def test_compactions_while_decoding(keys: CompileKeys, name: str) -> None:
    check(keys, {"preset": name, "trigger": "both", "interval": 128}, LLAMA)


@pytest.mark.parametrize("name", ["snapkv", "windowkv_qwen2.5", "rkv", "lagkv", "h2o"])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_caches_of_8_bits(keys: CompileKeys, name: str, kind: torch.dtype) -> None:
    """Every kernel that reads a cache; rows are moved as bytes."""
    model = StandIn(parse_config(name), replace(LLAMA, eight_bits=kind))
    model.runner.warm_up_compaction()
    types = {value for found in keys.take().values() for key in found for _, value in key}
    named = {"*fp8e4nv" if kind is torch.float8_e4m3fn else "*fp8e5"}
    assert named < {value[0] for value in types if isinstance(value, tuple)}
    check(keys, name, replace(LLAMA, eight_bits=kind))


def test_one_kv_head(keys: CompileKeys) -> None:
    """A rank of tensor parallelism: strides and counts are 1, of which Triton makes constants."""
    shape = Shape(num_layers=4, num_heads=4, num_kv_heads=1, hidden_size=512)
    for name in ("spindlekv", "windowkv_qwen2.5"):
        check(keys, name, shape)


def test_a_key_that_is_new_is_seen(keys: CompileKeys) -> None:
    """A count that does not begin at a multiple of 16 bytes, as a slice of a table has it."""
    scores, forced = torch.zeros(1, 1, 1, 8, device=META), torch.zeros(1, 8, device=META).bool()
    counts = torch.zeros(2, 1, dtype=torch.int32, device=META)
    select_tokens(scores, forced, counts[0], counts[0], 3)
    warmed = keys.take()
    select_tokens(scores, forced, counts[0], counts[1], 3)
    difference = "num_keep_ptr: ('*i32', 'D') -> ('*i32', '')"
    assert unseen(keys.take(), warmed) == [f"_select_kernel: {[difference]}"]
