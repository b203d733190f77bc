"""Models that see images: their image tokens are tokens, kept or evicted like all others.

The reference is transformers over the same survivors, given the same images. Processors of
Qwen-VL, Mistral 3, Gemma 3 and Gemma 4 import torchvision, which installations for CPUs lack: their
tests are skipped there.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from lab.delta_rule import in_any_precision
from lab.random_models import distinct_tokens
from tests.e2e.conftest import assert_idle, opened, serving
from tests.e2e.multimodal import TOKENS, MultimodalReplay, Seen, Tiny
from tests.e2e.tiny_multimodal import (
    write_gemma3,
    write_gemma4,
    write_llava,
    write_mistral3,
    write_paddleocr_vl,
    write_qwen_of_videos,
    write_qwen_vl,
)
from tests.inside import managers, preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.block_manager import CompressedAttentionManager
from vllm_kvcompress.core.host_groups import HostGroup
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

BLOCK, NUM_TOKENS = 32, 12
SETTING: dict[str, Any] = {
    "preset": "snapkv",
    "budget": {"ratio": 0.25, "floor": 1},
    "min_prompt_len": 64,
}
TWO_GROUPS = {**SETTING, "preset": "pyramidkv", "layer_groups": {"count": 2}}
PLACE = 120  # of the image in a prompt: a chunk of 160 tokens ends inside it
ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 160,
    "block_size": BLOCK,
}
WITH_IMAGES = {**ENGINE, "limit_mm_per_prompt": {"image": 2}}
UNCOMPRESSED = {"kv_compression": "none"}


def words(num_tokens: int, seed: int = 0) -> list[int]:
    """Token ids of text: none that stands for an image or a line."""
    return [each for each in distinct_tokens(num_tokens + 20, seed) if each < 1500][:num_tokens]


def run(engine: Engine, name: str, prompt: Any, xargs: Any = None, count: int = NUM_TOKENS) -> Any:
    """A request from its start to its end."""
    given = prompt if isinstance(prompt, list | dict) else prompt.for_vllm()
    engine.add(name, given, count, xargs, ignore_eos=True)
    engine.drain()
    return engine.results[name]


# --- M-RoPE -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paddle(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder: Path = tmp_path_factory.mktemp("paddleocr_vl")
    return write_paddleocr_vl(folder)


@pytest.fixture(scope="module")
def replay(paddle: Tiny) -> MultimodalReplay:
    return MultimodalReplay(paddle, BLOCK)


class TestWithSeveralPositions:
    """PaddleOCR-VL: tokens of an image have three positions, and text goes on behind them."""

    @pytest.fixture(scope="class")
    def engine(self, paddle: Tiny) -> Iterator[Engine]:
        with opened(paddle.folder, TWO_GROUPS, **WITH_IMAGES) as engine:
            yield engine

    @pytest.fixture(scope="class")
    def seen(self, paddle: Tiny, replay: MultimodalReplay) -> Seen:
        return replay.see(paddle.prompt(words(400), {PLACE: 0}))

    def test_uncompressed(
        self, engine: Engine, paddle: Tiny, replay: MultimodalReplay, seen: Seen
    ) -> None:
        assert seen.ahead < 0, "an image takes fewer positions than tokens"
        prompt = paddle.prompt(words(400), {PLACE: 0})
        found = run(engine, "kept", prompt, UNCOMPRESSED)
        assert found.token_ids == replay.generate(seen, None, NUM_TOKENS)
        other = run(engine, "other", paddle.prompt(words(400), {PLACE: 1}), UNCOMPRESSED)
        assert other.num_cached_tokens == PLACE // BLOCK * BLOCK, "another image, another hash"
        assert other.token_ids != found.token_ids, "the image counts"

    def test_compressed_with_a_cold_cache_and_a_warm_one(
        self, engine: Engine, paddle: Tiny, replay: MultimodalReplay
    ) -> None:
        assert len([m for m in managers(engine) if isinstance(m, CompressedAttentionManager)]) == 2
        prompt = paddle.prompt(words(400, seed=1), {PLACE: 2})
        seen = replay.see(prompt)
        expected = replay.generate(seen, parse_config(TWO_GROUPS), NUM_TOKENS)
        cold = run(engine, "cold", prompt)
        assert cold.token_ids == expected != replay.generate(seen, None, NUM_TOKENS)
        warm = run(engine, "warm", prompt)
        assert warm.num_cached_tokens > PLACE + TOKENS
        assert warm.token_ids == expected
        assert_idle(engine)

    def test_two_images_and_a_hit_that_ends_inside_the_second(
        self, engine: Engine, paddle: Tiny, replay: MultimodalReplay
    ) -> None:
        tokens = words(400, seed=2)
        first = paddle.prompt(tokens[:152], {PLACE: 3, 150: 4})
        run(engine, "begun", first)
        prompt = paddle.prompt(tokens, {PLACE: 3, 150: 4})
        found = run(engine, "goes on", prompt)
        begins = 150 + TOKENS + 4
        assert begins < found.num_cached_tokens < begins + TOKENS
        expected = replay.generate(replay.see(prompt), parse_config(TWO_GROUPS), NUM_TOKENS)
        assert found.token_ids == expected

    def test_text_and_an_image_in_one_batch(
        self, engine: Engine, paddle: Tiny, replay: MultimodalReplay
    ) -> None:
        text, prompt = words(300, seed=5), paddle.prompt(words(300, seed=6), {200: 5})
        engine.add("text", text, NUM_TOKENS, ignore_eos=True)
        engine.add("image", prompt.for_vllm(), NUM_TOKENS, ignore_eos=True)
        engine.drain()
        config = parse_config(TWO_GROUPS)
        expected = replay.generate(replay.prefill(text), config, NUM_TOKENS)
        assert engine.results["text"].token_ids == expected
        expected = replay.generate(replay.see(prompt), config, NUM_TOKENS)
        assert engine.results["image"].token_ids == expected

    def test_preempted_and_compacted_again(self, engine: Engine, paddle: Tiny) -> None:
        prompt = paddle.prompt(words(350, seed=7), {PLACE: 6})
        alone = run(engine, "alone", prompt, count=24)
        engine.add("preempted", prompt.for_vllm(), 24, ignore_eos=True)
        while len(engine.results["preempted"].token_ids) < 8:
            engine.step()
        preempt(engine, engine.live()["preempted"])
        engine.drain()
        assert_idle(engine)
        assert engine.results["preempted"].token_ids == alone.token_ids

    def test_compactions_while_decoding(self, engine: Engine, paddle: Tiny) -> None:
        """By a policy without queries: the server's setting keeps none of those of decoding."""
        setting = {**TWO_GROUPS, "preset": "keydiff", "trigger": "both", "interval": 32}
        with serving(engine, setting):
            run(engine, "long", paddle.prompt(words(400, seed=8), {PLACE: 7}), count=100)
        assert engine.scheduler.stats.compactions["keydiff/decode"] >= 2
        assert_idle(engine)

    def test_requests_choose_their_policy(
        self, engine: Engine, paddle: Tiny, replay: MultimodalReplay
    ) -> None:
        prompt = paddle.prompt(words(400), {PLACE: 0})
        for preset in ("expected_attention", "streaming_llm_rerotated"):
            with pytest.raises(VLLMValidationError, match="tokens of images several positions"):
                engine.add(preset, prompt.for_vllm(), 4, {"kv_compression": preset})
        given = {"kv_compression": "knorm", "kv_budget_ratio": 0.25}
        engine.add("chosen", prompt.for_vllm(), NUM_TOKENS, given, ignore_eos=True)
        config = engine.scheduler.planner.requests[engine.live()["chosen"].request_id].config
        assert config.policy.name == "knorm" and config.budget.ratio == 0.25
        assert engine.live()["chosen"].num_prompt_tokens == len(prompt.expanded())
        engine.drain()
        expected = replay.generate(replay.see(prompt), config, NUM_TOKENS)
        assert engine.results["chosen"].token_ids == expected


def test_without_its_eyes(paddle: Tiny, replay: MultimodalReplay) -> None:
    """--language-model-only: M-RoPE's positions of a token are all the same, as without it."""
    text = words(400, seed=9)
    with opened(paddle.folder, SETTING, **ENGINE, language_model_only=True) as engine:
        for preset in ("snapkv", "expected_attention", "streaming_llm_rerotated"):
            setting = {**SETTING, "preset": preset}
            with serving(engine, setting):
                found = run(engine, preset, text)
            expected = replay.generate(replay.prefill(text), parse_config(setting), NUM_TOKENS)
            assert found.token_ids == expected, preset
        with pytest.raises(ValueError, match="not available for text-only models"):
            engine.add("image", paddle.prompt(text, {PLACE: 0}).for_vllm(), 4)


FAMILIES: dict[str, Callable[[Path], Tiny]] = {
    "qwen2.5": partial(write_qwen_vl, name="qwen2.5"),
    "qwen2.5, videos": write_qwen_of_videos,
    "qwen3": partial(write_qwen_vl, name="qwen3"),
    "qwen3.5": partial(write_qwen_vl, name="qwen3.5"),
    "mistral3": write_mistral3,
    "gemma4": write_gemma4,
    "llava": write_llava,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_torchvision(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torchvision")
    check_family(FAMILIES[name](tmp_path), name)


def check_family(model: Tiny, name: str) -> None:
    """With the n-gram drafter, whose drafts are verified over what is left, where it may draft."""
    config = parse_config(TWO_GROUPS)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    limits = {"image": 0, "video": 0} if name.startswith("qwen") else {}
    given = {**ENGINE, "limit_mm_per_prompt": limits | {model.kind: 1}}
    if name not in ("qwen3.5", "gemma4"):
        given["speculative_config"] = drafts
    with in_any_precision(), opened(model.folder, TWO_GROUPS, **given) as engine:
        replay = MultimodalReplay(model, engine.engine.vllm_config.cache_config.block_size)
        prompt, text = model.prompt(words(300), {PLACE: 0}), words(300, seed=1)
        seen = replay.see(prompt)
        whole = replay.generate(seen, None, 40)
        assert run(engine, "kept", prompt, UNCOMPRESSED, 40).token_ids == whole
        expected = replay.generate(seen, config, 40)
        assert run(engine, "cold", prompt, count=40).token_ids == expected != whole
        assert run(engine, "warm", prompt, count=40).token_ids == expected
        expected = replay.generate(replay.prefill(text), config, 40)
        assert run(engine, "text", text, count=40).token_ids == expected
        assert_idle(engine)


# --- windowed layers ----------------------------------------------------------------------


class TestWithWindowedLayers:
    """Gemma 3. On a CPU, vLLM lets tokens of an image see what is before them only."""

    @pytest.fixture(scope="class")
    def gemma(self, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
        pytest.importorskip("torchvision")
        folder: Path = tmp_path_factory.mktemp("gemma3")
        return write_gemma3(folder)

    @pytest.fixture(scope="class")
    def engine(self, gemma: Tiny) -> Iterator[Engine]:
        with opened(gemma.folder, SETTING, **WITH_IMAGES, enable_prompt_embeds=True) as engine:
            yield engine

    @pytest.fixture(scope="class")
    def replay(self, gemma: Tiny) -> MultimodalReplay:
        return MultimodalReplay(gemma, BLOCK)

    def test_images(self, engine: Engine, gemma: Tiny, replay: MultimodalReplay) -> None:
        assert {type(m) for m in managers(engine)} == {CompressedAttentionManager, HostGroup}
        prompt = gemma.prompt(words(400), {PLACE: 0})
        seen = replay.see(prompt)
        whole = replay.generate(seen, None, NUM_TOKENS)
        expected = replay.generate(seen, parse_config(SETTING), NUM_TOKENS)
        cold, warm = run(engine, "cold", prompt), run(engine, "warm", prompt)
        assert cold.token_ids == expected != whole
        assert warm.num_cached_tokens > PLACE + TOKENS and warm.token_ids == expected
        assert run(engine, "kept", prompt, UNCOMPRESSED).token_ids == whole
        assert_idle(engine)

    def test_a_prompt_of_embeddings_is_compressed_like_its_tokens(
        self, engine: Engine, replay: MultimodalReplay
    ) -> None:
        text = words(300, seed=1)
        given = engine.runner.model.embed_input_ids(torch.tensor(text)).detach()
        found = run(engine, "embeddings", {"prompt_embeds": given})
        expected = replay.generate(replay.prefill(text), parse_config(SETTING), NUM_TOKENS)
        assert found.token_ids == expected
