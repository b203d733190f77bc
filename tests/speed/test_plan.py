"""What `plan --speed` puts together: compactions, break-even, throughput; mostly by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.serving.models import MODELS
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import request_usage
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.speed.compaction import heads_of
from vllm_kvcompress.speed.machine import MACHINES, Machine
from vllm_kvcompress.speed.passes import prefill
from vllm_kvcompress.speed.plan import SpeedPlan
from vllm_kvcompress.speed.scoring import META, OperationCounter, Probe
from vllm_kvcompress.speed.shapes import ModelShape

SHAPE = ModelShape.from_config(MODELS["llama-3-8b"])
GEOMETRY = ModelGeometry(32, 8, 128, "bfloat16")
H200 = replace(MACHINES["h200"], launch_seconds=5e-6)
WEIGHTS = 15_009_316_864  # bytes a pass reads; a token's cache is 2^17


def plan_of(
    preset: str = "snapkv",
    prompt: int = 8192,
    output: int = 0,
    machine: Machine = H200,
    ranks: int = 1,
    **fields: Any,
) -> SpeedPlan:
    config = parse_config({"preset": preset, **fields})
    assert config is not None
    usage = request_usage(GEOMETRY, config, prompt, output, 16, ranks)
    return SpeedPlan(SHAPE.shard(ranks), machine, config, usage, prompt, output, 16)


# --- a compaction -------------------------------------------------------------------------


def test_a_compaction_by_hand() -> None:
    """8,192 tokens, of which 12 % are 983: 62 blocks, 992 tokens. Keys of one are 2,048 bytes."""
    stages = {stage.name: stage for stage in plan_of().compaction.path.stages}
    assert list(stages) == ["queries", "score", "policy", "select", "copy"]
    queries, score, policy = stages["queries"], stages["score"], stages["policy"]
    assert queries.read == 32 * (8192 * 8 + 16 * 8192) and queries.written == 32 * 16 * 8192
    assert queries.launches == 32 + 1
    assert score.read == 32 * 2 * (8192 * 2048 + 16 * 8192)
    assert score.written == 32 * 8 * 8192 * 4
    assert score.flops == 32 * 2 * (2 * 16 * 32 * 8192 * 128)
    assert score.launches == 3 * 32
    # Pooling reads and writes what lies before the window, a concatenation all of it.
    assert policy.read == policy.written == 32 * 4 * 8 * (8176 + 8192)
    assert policy.launches == 2 * 32
    side_by_side = 32 * 8 * 8192 * 4
    select, copy = stages["select"], stages["copy"]
    # A copy side by side, a look for NaN, the choice.
    assert select.read == 2 * side_by_side + 5 * side_by_side + 8192
    assert select.written == side_by_side + 32 * 8 * 992 * 8
    assert select.launches == 1 + 32 + 1 + (1 + 6)
    assert copy.read == 32 * 992 * (4096 + 64) and copy.written == 32 * 992 * 4096
    assert copy.launches == 1


def test_what_lies_behind_the_last_whole_block_is_not_copied() -> None:
    """8,200 tokens: 8 stay where they are; 984 are to be kept, so 976 of 8,192: 61 blocks."""
    stages = plan_of(prompt=8200).compaction.run
    assert stages.stage("copy").written == 32 * 976 * 4096
    assert stages.stage("score").written == 32 * 8 * 8200 * 4
    assert stages.stage("select").read == 7 * (32 * 8 * 8192 * 4) + 8192


def test_layers_that_share_a_ranking_are_scored_once() -> None:
    groups = {"layer_groups": {"count": 4}}
    policy = {"name": "windowkv", "window_size": 32}
    together = plan_of("keydiff", policy=policy, **groups).compaction.run
    alone = plan_of("keydiff", policy={**policy, "share_indices": False}, **groups).compaction.run
    assert together.stage("score").launches == 4 * 3
    assert alone.stage("score").read == 8 * together.stage("score").read
    assert together.stage("select").launches == 1 + 32 + 4 + (4 + 6 + 2)
    assert together.stage("copy") == alone.stage("copy")


def test_a_short_prompt_is_left_alone() -> None:
    plan = plan_of(prompt=500, output=100)
    assert plan.compaction.path.stages == ()
    assert plan.step(4) == plan.stock_step(4)
    assert plan.gain(4) == 1.0 and plan.tokens_to_pay(4) is None


def test_a_compaction_while_decoding() -> None:
    """The ring keeps queries in every step; nothing is kept while the prompt runs."""
    fields = {"trigger": "interval", "interval": 64, "budget": {"tokens": 1024}}
    plan = plan_of("tova", 8192, 1000, **fields)
    assert plan.compaction.capture.stages == ()
    assert plan.compaction.run.stage("score").written == 32 * 8 * (8192 + 64) * 4
    assert plan.compressed_tail == 32 and plan.tail == 500
    ring = plan.step(4).stage("ring")
    assert (ring.read, ring.written) == (32 * 4 * (8 + 8192), 32 * 4 * 8192)
    assert plan.step(4).launches == 1 + 2 + 1
    assert not plan.can_draft
    quiet = plan_of("keydiff", 8192, 1000, **fields).step(4)
    assert [stage.name for stage in quiet.stages] == ["matrices", "attention"]


def test_a_codebook() -> None:
    """A quarter of the layers: their slots stand for more tokens, and their books are built."""
    plan = plan_of("spindlekv", 8192, 256)
    assert plan.kept_tokens > plan.kept_slots
    coded = [g for g in plan.usage.groups if g.tokens_attended != g.tokens_after]
    assert [g.layer_group for g in coded] == list(range(8))
    copied = plan.compaction.run.stage("copy").launches
    assert copied == 32 - 8, "coded groups are not copied"
    books = plan.compaction.run.stage("books")
    assert books.launches == 8 * (1 + 2 * 4)
    problems = sum(16 * 2 * g.tokens_attended**2 * 128 for g in coded)
    assert books.flops == problems, "the prompt is whole blocks, so all that stays was coded"
    # No full graph: 33 pieces, 2 launches a layer around attention, 3 more where it reads books.
    assert plan.step(1).launches == 2 + 33 + 64 + 3 * 8
    attended = plan.step(1).stage("attention").flops
    assert attended == pytest.approx(SHAPE.attention_flops * (plan.kept_tokens + 128))


def test_ranks_share_a_compaction() -> None:
    """Eight ranks hold one KV head each; a mean over all heads is summed over ranks, a launch."""
    one, eight = plan_of("tova").compaction.run, plan_of("tova", ranks=8).compaction.run
    assert eight.stage("copy").written == one.stage("copy").written / 8
    assert eight.stage("policy").launches == one.stage("policy").launches + 32


# --- counting a policy --------------------------------------------------------------------


class Curious(Policy):
    """Waits for the device."""

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return inputs.keys.float().sum(-1) * float(inputs.keys.max())


class Chunky(Policy):
    """Reads all queries: two operations a chunk."""

    @property
    def queries(self) -> Queries:
        return Queries.PROMPT

    def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> Any:
        total = chunk.queries.sum()
        return total if accumulated is None else accumulated + total

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        return inputs.accumulated.expand(inputs.rows.num_kv_heads, inputs.rows.num_tokens)


def probe(policy: Policy, **more: Any) -> Probe:
    return Probe(policy, heads_of(SHAPE), 4096, 16, 4, **more)


def test_a_policy_that_waits_for_the_device_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="--speed: the policy Curious cannot be counted") as found:
        probe(Curious()).score(1000, 100)
    assert str(found.value).endswith(").") and "\n" not in str(found.value)


def test_queries_are_folded_chunk_by_chunk() -> None:
    """A chunk's length is written, its queries are added up, and the sum to those before."""
    found = probe(Chunky(), chunk_tokens=100)
    assert sum(launch.operations for launch in found.fold(250)) == 3 * 2 + 2
    assert found.score(250, 20).operations.operations == 0, "a view is no launch"
    assert probe(Curious()).fold(250) == []


def test_operations_are_counted_as_the_device_runs_them() -> None:
    with OperationCounter(META) as counter:
        rows = torch.empty(4, 10, device=META)  # nothing
        rows[:2].t().reshape(-1)  # a copy of 80 bytes
        rows.view(10, 4).unsqueeze(0).expand(3, 10, 4)  # nothing
        torch.nn.functional.linear(rows, rows)  # [4, 10] @ [10, 4]
        torch.empty(5).add_(1)  # on the host
        rows.masked_fill_(rows > 0, 1.0)  # two
        torch.arange(3).to(META)  # a copy from the host, 24 bytes
    assert counter.operations == 5
    assert counter.flops == 2 * 4 * 4 * 10
    read = 80 + (160 + 160) + 160 + (160 + 40) + 24
    assert counter.read == read
    assert counter.written == 80 + 64 + 40 + 160 + 24


# --- what it comes to ---------------------------------------------------------------------

BYTES = Machine(bandwidth=1e9)  # time is bytes


def test_a_step_by_hand() -> None:
    plan = plan_of(output=512, machine=BYTES)
    assert plan.stock_step(2).read == WEIGHTS + 2 * (8192 + 256) * 2**17
    assert plan.step(2).read == WEIGHTS + 2 * (992 + 256) * 2**17
    new = 2 * 2**17
    gain = (plan.stock_step(2).read + new) / (plan.step(2).read + new)
    assert plan.gain(2) == pytest.approx(gain)
    assert plan.step(2).launches == 3 and plan.stock_step(2).launches == 1


def test_it_pays_when_steps_have_saved_what_compactions_took() -> None:
    plan = plan_of(output=512, machine=BYTES)
    took = 2 * plan.compaction.path.num_bytes
    assert plan.tokens_to_pay(2) == pytest.approx(took / (2 * 7200 * 2**17))
    assert plan.tokens_to_pay(64) == pytest.approx(plan.tokens_to_pay(1)), "both grow alike"


def test_throughput_by_hand() -> None:
    """A pool of 64 GiB holds 32,767 blocks of 2 MiB: 60 requests of 544 blocks, or of 94 beside
    the 512 of one prompt: 1 + (32767 - 512) // 94 = 344."""
    plan = plan_of(output=512, machine=BYTES)
    found = plan.served(64 << 30)
    stock, mine = found["without"], found["with"]
    assert stock is not None and mine is not None and "draft" not in found
    assert (stock.batch, mine.batch) == (60, 344)
    step = (WEIGHTS + 60 * (8448 + 1) * 2**17) / 1e9
    assert stock.step_seconds == pytest.approx(step)
    assert stock.decode_rate == pytest.approx(60 / step)
    once = prefill(SHAPE, 8192).num_bytes / 1e9
    assert stock.rate == pytest.approx(512 / (once + 512 * step / 60))
    step = (WEIGHTS + 344 * (1248 + 1) * 2**17) / 1e9
    once += plan.compaction.path.num_bytes / 1e9
    assert mine.rate == pytest.approx(512 / (once + 512 * step / 344))
    assert plan.served(1 << 30) == {"without": None, "with": None}


def test_draft_mode_by_hand() -> None:
    """Four drafts over 992 of 8,192 tokens, and a pass over all; 62 + 1 blocks more a request."""
    plan = plan_of(output=512, machine=BYTES, mode="draft")
    case = plan.drafting(2)
    assert case.view_ratio == 992 / 8192
    draft = WEIGHTS + 2 * (992 + 256 + 1) * 2**17
    verify = WEIGHTS + 2 * (8192 + 256 + 5) * 2**17
    assert case.step.num_bytes == 4 * draft + verify
    plain = plan.stock_step(2).num_bytes
    assert plan.needed_length(2) == pytest.approx((4 * draft + verify) / plain)
    found = plan.served(64 << 30, accepted=3.0)
    assert list(found) == ["without", "draft"], "nothing is evicted"
    drafted = found["draft"]
    assert drafted is not None and drafted.batch == 32_767 // (544 + 62 + 1)
    assert drafted.decode_rate == pytest.approx(3 * drafted.batch / drafted.step_seconds)


@settings(deadline=None, max_examples=40)
@given(st.integers(600, 100_000), st.integers(1, 256), st.integers(0, 2000), st.floats(0.05, 0.5))
def test_compression_gains_more_where_there_is_more_cache(
    prompt: int, batch: int, output: int, ratio: float
) -> None:
    def plan(tokens: int, share: float) -> SpeedPlan:
        return plan_of("streaming_llm", tokens, output, BYTES, budget={"ratio": share})

    found = plan(prompt, ratio)
    assert found.gain(batch) > 1
    assert found.gain(batch + 1) > found.gain(batch)
    assert plan(prompt, ratio / 2).gain(batch) >= found.gain(batch)
    assert plan(2 * prompt, ratio).gain(batch) > 0.99 * found.gain(batch), "up to whole blocks"
    assert found.needed_length(batch + 1) < found.needed_length(batch) <= 5.001
