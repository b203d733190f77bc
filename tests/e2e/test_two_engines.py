"""Two engines behind two API servers: ``--data-parallel-size 2 --api-server-count 2``."""

import re
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.serving import Server, serving

pytestmark = pytest.mark.engine

OPTIONS = [
    *["--max-model-len", "2048", "--kv-cache-memory-bytes", "67108864", "--max-num-seqs", "4"],
    *["--enforce-eager", "--dtype", "float32"],
    *["--data-parallel-size", "2", "--api-server-count", "2"],
    *["--kv-compression", "snapkv", "--kv-compression-config.budget.ratio=0.25"],
]
NUM_REQUESTS = 8


@pytest.fixture(scope="module")
def server(probe_model: str, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(probe_model, log, *OPTIONS) as running:
        yield running


def compressed(server: Server, engine: int) -> float:
    return server.metric("vllm:kv_compression_requests_total", engine=str(engine), policy="snapkv")


def test_every_engine_compresses_and_is_counted_once(server: Server) -> None:
    """The processes of the API servers once had no setting: the first count ended them."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    for engine in (0, 1):
        sample = rf'vllm:kv_compression_requests_total\{{engine="{engine}",.*\}} 0.0'
        assert re.search(sample, text), "there from the start"
    for number in range(NUM_REQUESTS):
        prompt = [5 + (i * 7919 + number * 13) % 900 for i in range(1000)]
        # A connection of its own each time: the kernel gives it to either API server.
        assert server.complete(prompt, ignore_eos=True).status_code == 200
    counts = [compressed(server, engine) for engine in (0, 1)]
    assert sum(counts) == NUM_REQUESTS and min(counts) > 0, counts
    again = [compressed(server, engine) for engine in (0, 1)]
    assert again == counts, "both API servers say the same"


def test_every_api_server_checks_options(server: Server) -> None:
    for _ in range(6):
        response = server.complete("One, two", vllm_xargs={"kv_budget_ratio": 2})
        assert response.status_code == 400
        assert "kv_budget_ratio" in response.json()["error"]["message"]
