"""vLLM pads a prompt's last token with drafts, and relies on getting all of them."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import assert_idle, opened
from vllm_kvcompress.evaluation.engine import Engine, Result

pytestmark = pytest.mark.engine

NGRAM = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2
}  # fmt: skip


@pytest.fixture(scope="module", params=["ngram", "draft"])
def engine(request, probe_model: str) -> Iterator[Engine]:
    setting = {"preset": "keydiff", "budget": {"ratio": 0.25}, "min_prompt_len": 256}
    options: dict = {"speculative_config": NGRAM}
    if request.param == "draft":
        setting |= {"mode": "draft", "draft": {"tokens": 3}}
        options = {}
    with opened(probe_model, setting, max_model_len=4096, **options) as engine:
        yield engine


@pytest.mark.parametrize("preset", ["keydiff", "streaming_llm", "none"])
@pytest.mark.parametrize("length", [513, 1024])
def test_a_prompt_that_is_cached_up_to_its_last_token(engine, preset: str, length: int) -> None:
    """Two such requests once ended the server; any client could send them."""
    prompt = [5 + (i * 7919 + length) % 900 for i in range(length)]
    engine.generate([prompt], 8, {"kv_compression": "none"}, ignore_eos=True)
    engine.results.clear()
    xargs = {"kv_compression": preset}
    first = engine.generate([prompt], 12, xargs, ignore_eos=True)
    (result,) = engine.results.values()
    # A block is always left to compute; of 513 tokens that is the last one.
    assert result.num_cached_tokens == (length - 1) // 32 * 32
    assert engine.scheduler.reset_prefix_cache()
    assert engine.generate([prompt], 12, xargs, ignore_eos=True) == first
    assert_idle(engine)


def test_siblings(engine) -> None:
    from vllm import SamplingParams

    prompt = [5 + (i * 7919) % 900 for i in range(1025)]
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=5, ignore_eos=True)
    engine.results["siblings"] = Result()
    engine.engine.add_request("siblings", {"prompt_token_ids": prompt}, params)
    engine.drain()
    assert_idle(engine)
