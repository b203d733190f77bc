"""Ranks that hold copies of one KV head (MLA) keep what all of them score highest."""

import pytest
import torch

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.worker.batch import CompactionJob, group_batches
from vllm_kvcompress.worker.compaction.compactor import Compactor
from vllm_kvcompress.worker.layout.latent import GatheredLatentLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

BLOCK, WINDOW, COUNT = 16, 4, 64
SETTING = {"preset": "snapkv", "observation_window": WINDOW, "policy": {"kernel_size": 1}}


class Window:
    """The window's queries [H, w, D] of one rank's heads."""

    def __init__(self, queries: torch.Tensor) -> None:
        self.queries = queries

    def take(self, request_id: str, layer_name: str, end: int) -> torch.Tensor:
        return self.queries


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shares_head", [True, False])
def test_scores_are_those_of_all_heads(shares_head: bool) -> None:
    rows, queries = noise(1, COUNT, 48, seed=0), 2 * noise(4, WINDOW, 48, seed=1)
    cache = rows.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
    halves = queries.chunk(2)
    other = DenseRows(rows, rows, halves[1], 1.0).attention(WINDOW)
    compactor = Compactor(
        layers=[], num_layers=1, sources=None, device=torch.device("cpu"),  # type: ignore[arg-type]
        all_reduce=lambda scores: scores.add_(other), num_ranks=2, first_kv_head=0,
        shares_head=shares_head,
    )  # fmt: skip
    compactor.sources = type("Sources", (), {"window": Window(halves[0])})()  # type: ignore[assignment]
    config = parse_config(SETTING)
    assert config is not None
    plan = GroupPlan(
        GroupLengths(COUNT, BLOCK), GroupCache(COUNT, ((0, 4),)), ((0, 4),), (0, 1, 2, 3), (4,), ()
    )
    job = CompactionJob(CompactionPlan("a", COUNT, False, 0, (plan,)), config, 0)
    (batch,) = group_batches([job], {0: [0]}, torch.device("cpu")).values()
    layout = GatheredLatentLayout(32, lambda given: given)
    layer = LayerCache("0", 0, 0, 1.0, layout, lambda: cache)
    (found,) = compactor.scores(config.build_policy(), batch, layer, {})
    heads = queries if shares_head else halves[0]
    expected = DenseRows(rows, rows, heads, 1.0).attention(WINDOW)
    torch.testing.assert_close(found, expected)
