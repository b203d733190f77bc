"""``vllm serve`` with a pool that is smaller than its longest prompt."""

from pathlib import Path

import pytest

from tests.e2e.serving import serving

pytestmark = pytest.mark.engine

PROMPT = [5 + (i * 7919) % 4000 for i in range(3500)]


def test_a_server_answers_long_prompts_and_refuses_what_cannot_fit(
    probe_model: str, tmp_path: Path
) -> None:
    """256 of 3,500 tokens are kept, and 512 come between two marks: 24 blocks of 32, and a tail."""
    options = [
        *["--max-model-len", "4096", "--dtype", "float32", "--enforce-eager"],
        *["--num-gpu-blocks-override", "30", "--kv-cache-memory-bytes", "64M"],
        *["--kv-compression", "snapkv", "--kv-compression-config"],
        '{"trigger": "prompt", "prompt_interval": 512, "budget": {"tokens": 256}}',
    ]
    with serving(probe_model, tmp_path / "server.log", *options) as server:
        found = server.complete(PROMPT)
        assert found.status_code == 200, found.text
        assert found.json()["usage"]["prompt_tokens"] == 3500
        refused = server.complete(PROMPT, vllm_xargs={"kv_compression": "none"})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"] == "input_tokens"
        assert "needs 110 KV cache blocks of 32 tokens" in error["message"]
        assert "this server has 29" in error["message"]
        assert "up to 927 tokens" in error["message"]
        short = {"vllm_xargs": {"kv_compression": "none"}, "max_tokens": 300, "ignore_eos": True}
        found = server.complete(PROMPT[:900], **short)
        (choice,) = found.json()["choices"]
        assert choice["finish_reason"] == "length"
        assert found.json()["usage"]["completion_tokens"] == 28
        assert server.metric("vllm:kv_compression_requests_total") == 1
