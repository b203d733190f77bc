"""A chat with an image over HTTP: compressed, counted, and the tokens of transformers."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.random_models import distinct_tokens
from tests.e2e.multimodal import TOKENS, MultimodalReplay, Tiny, image
from tests.e2e.serving import Server, serving
from tests.e2e.tiny_multimodal import write_paddleocr_vl
from vllm_kvcompress.config.reading import parse_config

pytestmark = pytest.mark.engine

BLOCK, NUM_TOKENS, WORDS = 32, 12, 400
OPTIONS = [
    *["--max-model-len", "1024", "--block-size", str(BLOCK), "--kv-cache-memory-bytes", "67108864"],
    *["--max-num-seqs", "4", "--dtype", "float32", "--enforce-eager"],
    *["--chat-template", "{{ messages[0]['content'] }}"],
    *["--kv-compression", "snapkv", "--kv-compression-config.budget.ratio=0.25"],
    *["--kv-compression-config.budget.floor=1", "--kv-compression-config.min_prompt_len=64"],
]
SETTING = {"preset": "snapkv", "budget": {"ratio": 0.25, "floor": 1}, "min_prompt_len": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_paddleocr_vl(tmp_path_factory.mktemp("paddleocr_vl"))


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log: Path = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(tiny.folder, log, *OPTIONS) as running:
        yield running


def chat(server: Server, seed: int, text: str, **fields: Any) -> list[int]:
    """Tokens of the answer to an image with a text behind it."""
    picture = io.BytesIO()
    image(seed).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {
        "model": "probe", "messages": [{"role": "user", "content": content}], "temperature": 0,
        "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True, **fields,
    }  # fmt: skip
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["prompt_tokens"] == TOKENS + 2 + WORDS
    return reply.json()["choices"][0]["token_ids"]


def test_a_chat_with_an_image(server: Server, tiny: Tiny) -> None:
    # The tokenizer cuts w1 and w2, which are special, off the longer words that begin so.
    words = [each for each in distinct_tokens(1400) if str(each)[0] not in "12"][:WORDS]
    text = " ".join(f"w{each}" for each in words)
    replay = MultimodalReplay(tiny, BLOCK)
    seen = replay.see(tiny.prompt(words, {0: 7}))
    whole = replay.generate(seen, None, NUM_TOKENS)
    kept = replay.generate(seen, parse_config(SETTING), NUM_TOKENS)
    assert kept != whole, "what is evicted shows in the tokens"

    assert chat(server, 7, text, vllm_xargs={"kv_compression": "none"}) == whole
    assert server.metric("vllm:kv_compression_requests_total") == 0
    assert chat(server, 7, text) == kept
    assert server.metric("vllm:kv_compression_requests_total", policy="snapkv") == 1
    taken, returned = (
        server.metric(f"vllm:kv_compression_blocks_{name}_total", policy="snapkv")
        for name in ("taken", "returned")
    )
    assert returned > taken > 0
    evicted = server.metric("vllm:kv_compression_tokens_evicted_total")
    assert evicted > (TOKENS + WORDS) // 2
    assert chat(server, 8, text) != kept, "another image, another answer"
