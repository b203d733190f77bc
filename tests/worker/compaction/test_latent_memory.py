"""Absorbed queries (MLA) are as wide as cached rows: what is kept free counts them."""

import gc
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.stand_in import META, Shape, StandIn, jobs_of, replace_launches
from tests.worker.compaction.memory_watch import MemoryWatch
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.worker.compaction import compactor, working_memory
from vllm_kvcompress.worker.compaction.compactor import QuerySources
from vllm_kvcompress.worker.compaction.working_memory import RankShape, compaction_bytes
from vllm_kvcompress.worker.layout.latent import LatentLayout, absorb

LONGEST, HEADS, NOPE, ROTATED, LATENT, WINDOW = 4096, 64, 128, 64, 512, 64
SETTING = {
    "preset": "snapkv",
    "observation_window": WINDOW,
    "budget": {"ratio": 0.05},
    "min_prompt_len": 1024,
}


@pytest.mark.parametrize("lengths", [[LONGEST], [1024, 1024, 1024, 1024]])
def test_no_more_is_held_than_is_kept_free(monkeypatch, lengths: list[int]) -> None:
    replace_launches(monkeypatch, lambda *_: None)
    for module in (compactor, working_memory):
        monkeypatch.setattr(module, "MAX_TOKENS", LONGEST)
    config = parse_config(SETTING)
    assert config is not None
    width = LATENT + ROTATED
    shape = Shape(num_layers=1, num_heads=HEADS, num_kv_heads=1, head_dim=width)
    model = StandIn(config, shape)
    up = torch.empty(HEADS, NOPE, LATENT, dtype=shape.dtype, device=META)
    layout = LatentLayout(width, LATENT, shape.block_size, lambda query: absorb(query, up))
    (layer,) = model.compactor.layers
    rows = layer.cache()[..., :width]  # the stand-in has values besides
    model.compactor.layers = [replace(layer, layout=layout, cache=lambda: rows)]
    query = torch.empty(HEADS, WINDOW, NOPE + ROTATED, dtype=shape.dtype, device=META)
    held: Any = SimpleNamespace(take=lambda *_: query)
    model.compactor.sources = QuerySources(held, held, held)
    jobs = jobs_of(model, config, lengths)
    gc.collect()
    with MemoryWatch() as watch:
        model.compactor.run(jobs)
    plain = RankShape(
        1, [0], HEADS, 1, width, shape.hidden_size, shape.dtype, shape.block_size, LONGEST,
        shape.max_num_reqs,
    )  # fmt: skip
    absorbed = len(lengths) * HEADS * WINDOW * width * 2
    assert watch.peak > absorbed
    assert watch.peak <= compaction_bytes(config, replace(plain, absorbs_queries=True)) + 2**20
    assert compaction_bytes(config, plain) < absorbed, "without them it would be too little"
