"""The byte model of draft mode against numbers worked out by hand."""

import math
from dataclasses import replace

import pytest

from lab.serving.models import MODELS
from vllm_kvcompress.speed.drafting import Speculation, accepted_length
from vllm_kvcompress.speed.machine import MACHINES, Machine
from vllm_kvcompress.speed.shapes import ModelShape

SHAPES = {name: ModelShape.from_config(MODELS[name]) for name in ("llama-3-8b", "qwen3-8b")}
H200 = MACHINES["h200"]

# Layer: queries and output 2 * 8 * 2 * 4 = 128, keys and values 2 * 8 * 2 * 2 = 64, MLP
# 3 * 8 * 10 = 240; two layers 864; head 20 * 8 = 160: 1024 weights. A token: 2 * 2 * 2 * 2 = 16.
TINY = ModelShape(2, 8, 10, 4, 2, 2, 20, weight_bytes=2, cache_bytes=4)
CASE = Speculation(TINY, batch=3, context=100, view_ratio=0.25, num_drafts=4, tail=10)
BIG = Speculation(SHAPES["llama-3-8b"], batch=32, context=32_768, view_ratio=0.25, num_drafts=4)


def test_a_shape_by_hand() -> None:
    assert TINY.num_step_weights == 1024
    assert TINY.pass_weight_bytes == 2048
    assert TINY.kv_token_bytes == 64
    assert TINY.attention_flops == 4 * 2 * 4 * 2


def test_real_shapes() -> None:
    """8.03 and 8.19 billion parameters without the input embeddings; 128 and 144 KiB a token."""
    llama, qwen = SHAPES["llama-3-8b"], SHAPES["qwen3-8b"]
    assert llama.num_step_weights == 6_979_321_856 + 128_256 * 4096
    assert llama.kv_token_bytes == 128 * 1024
    assert qwen.num_step_weights == 6_945_767_424 + 151_936 * 4096
    assert qwen.kv_token_bytes == 144 * 1024


def test_configs_without_the_newer_fields() -> None:
    config = {k: v for k, v in MODELS["qwen3-8b"].items() if k != "head_dim"}
    assert ModelShape.from_config(config) == SHAPES["qwen3-8b"]
    config["num_key_value_heads"] = None
    assert ModelShape.from_config(config, cache_bytes=1).kv_token_bytes == 4 * 36 * 4096 // 2


def test_bytes_of_passes_by_hand() -> None:
    assert CASE.plain_step.read == 2048 + 3 * 110 * 64
    assert CASE.draft_step.read == 2048 + 3 * 35 * 64
    assert CASE.verify_pass.read == CASE.plain_step.read
    assert CASE.plain_step.written == 3 * 64
    assert CASE.verify_pass.written == 5 * 3 * 64
    assert CASE.view_bytes == 3 * 25 * 64


def test_flops_of_verify_by_hand() -> None:
    assert CASE.plain_step.flops == 2 * 1024 * 3 + 64 * 330
    assert CASE.verify_pass.stage("matrices").flops == 2 * 1024 * 15
    assert CASE.verify_pass.stage("attention").flops == 64 * 330 * 5


def test_bytes_per_token_by_hand() -> None:
    plain, draft = 2048 + 21_120, 2048 + 6720
    assert CASE.bytes_per_token("plain") == plain / 3
    assert CASE.bytes_per_token("given", 2.0) == plain / 6
    assert CASE.bytes_per_token("draft", 4.0) == (4 * draft + plain) / 12
    assert CASE.speed_up(4.0) == pytest.approx(4 * plain / (4 * draft + plain))
    assert CASE.speed_up(2.5, "given") == 2.5


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.0, 1.0), (0.5, 1.9375), (1.0, 5.0), (0.8, 3.3616)]
)
def test_accepted_length(probability: float, expected: float) -> None:
    assert accepted_length(probability, 4) == pytest.approx(expected)
    assert accepted_length(probability, 0) == 1


def test_probabilities_are_checked() -> None:
    with pytest.raises(ValueError, match="from 0 to 1, got 1.5"):
        accepted_length(1.5, 4)


def test_the_target_of_llama_at_32k_by_32() -> None:
    """152.4 GB a step, 49.4 GB a draft: (4 * 49.37 + 152.45) / 152.45 = 2.295 steps' bytes."""
    assert BIG.plain_step.read == pytest.approx(15_009_316_864 + 2**37)
    assert BIG.draft_step.read == pytest.approx(15_009_316_864 + 2**35)
    assert BIG.limit == pytest.approx(5 / 2.2953, rel=1e-3)
    assert BIG.needed_length(2.0) == pytest.approx(2 * 2.2953, rel=1e-3)
    assert BIG.speed_up(BIG.needed_length(2.0)) == pytest.approx(2.0)
    assert replace(BIG, view_ratio=0.12).limit > BIG.limit > 2


def test_where_drafting_starts_to_pay_is_where_the_speed_up_is_one() -> None:
    for target in (1.0, 1.5):
        tokens = BIG.tokens_to_pay(4.0, target)
        assert tokens is not None and tokens > 0
        there = replace(BIG, batch=1, context=round(tokens))
        assert there.speed_up(4.0) == pytest.approx(target, rel=1e-4)
        assert replace(there, context=there.context // 2).speed_up(4.0) < target
        assert replace(there, batch=2).speed_up(4.0) > target
    # By hand: (5 - 4) * 2048 / ((4 - 2) * 64) tokens.
    assert CASE.tokens_to_pay(4.0) == 16


def test_drafting_that_never_or_always_pays() -> None:
    assert BIG.tokens_to_pay(2.0) is None  # 1 + 4 * 0.25 steps' worth of cache for 2 tokens
    assert BIG.tokens_to_pay(5.0) == 0.0
    assert BIG.tokens_to_pay(5.0, target=2.6) is None


def memory_bound(case: Speculation) -> tuple[bool, ...]:
    return tuple(stage.waits_for_memory(H200) for stage in case.verify_pass.stages)


def test_verify_stops_being_memory_bound() -> None:
    assert memory_bound(BIG) == (True, True)
    # bfloat16: a weight's two FLOPs per token over its two bytes reach 206 at 206 tokens.
    assert memory_bound(replace(BIG, num_drafts=5))[0]
    assert not memory_bound(replace(BIG, num_drafts=6))[0]
    # Four query heads per KV head: 4 (k + 1) FLOPs per byte, whatever the batch.
    assert memory_bound(replace(BIG, num_drafts=50))[1]
    assert not memory_bound(replace(BIG, num_drafts=52))[1]


def test_seconds() -> None:
    work = CASE.verify_pass
    assert work.seconds(Machine(1.0)) == 2048 + 21_120 + 15 * 64
    assert work.seconds(Machine(math.inf, 2.0)) == work.flops / 2
    # Matrices compute-bound (30,720 FLOPs for 2048 bytes), attention not: 105,600 for 22,080.
    slow = Machine(1.0, 10.0)
    assert work.seconds(slow) == 3072 + 22_080
    assert CASE.speed_up(4.0, machine=slow) < CASE.speed_up(4.0)
    # Five times the matrices' FLOPs and the plain step's bytes, against four draft steps too.
    plain, draft = 2048 + 21_120 + 192, 2048 + 6720 + 192
    assert CASE.speed_up(4.0, machine=slow) == pytest.approx(4 * plain / (4 * draft + 25_152))
    assert CASE.needed_length(machine=slow) == pytest.approx((4 * draft + 25_152) / plain)


def test_launches_of_a_step() -> None:
    assert CASE.plain_step.launches == CASE.verify_pass.launches == 1
    assert CASE.step.launches == 31 + 4 * 16 + 1
    fast = Machine(math.inf, math.inf, launch_seconds=5e-6)
    assert CASE.step.seconds(fast) == pytest.approx(96 * 5e-6)


def test_llama_at_32k_by_32_does_not_fit_one_gpu_of_141_gb() -> None:
    assert BIG.largest_batch(141e9) == 23
    assert BIG.largest_batch(141e9, views=False) == 29
    assert BIG.largest_batch(0) == 0
