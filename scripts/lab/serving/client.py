"""Client of ``scripts/bench_serving.py``: sends batches to a server and reads its counters.

Each request is timed by the function that ``vllm bench serve`` times it with, so the times mean
the same. The command itself is not used: it needs 8 s to start for every measurement, and none of
its data sets takes prompts as given token ids.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from lab.serving import arithmetic
from lab.serving.arithmetic import Reading, Scenario
from lab.serving.models import MODELS
from vllm_kvcompress.errors import ConfigError

FIRST_TOKEN_ID = 16  # below are special tokens, or none
WAKE_LEN = 8
PROBES = 5

COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prefix_hit_tokens": "vllm:prefix_cache_hits_total",
    "compactions": "vllm:kv_compression_compactions_total",
    "deferrals": "vllm:kv_compression_deferrals_total",
    "uncompressed_requests": "vllm:kv_compression_uncompressed_requests_total",
    "blocks_taken": "vllm:kv_compression_blocks_taken_total",
    "blocks_returned": "vllm:kv_compression_blocks_returned_total",
    "compaction_seconds": "vllm:kv_compression_time_seconds_sum",
}


class BenchError(Exception):
    """Something a person can read and act on."""


@dataclass(frozen=True)
class Server:
    """A running server and what it says about its pool."""

    side: str
    url: str
    num_blocks: int
    block_bytes: float


def http_session() -> Any:
    """An aiohttp session without limits; vLLM brings aiohttp."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=6 * 3600))


async def fetch(session: Any, url: str, method: str = "GET") -> str:
    """Body of an answer."""
    import aiohttp

    try:
        async with session.request(method, url) as response:
            text = await response.text()
    except aiohttp.ClientError as error:
        raise BenchError(f"The server stopped answering: {error}.") from None
    if response.status != 200:
        raise BenchError(f"{url} answered HTTP {response.status}: {text[:300]}")
    return text


async def reset_prefix_cache(session: Any, url: str) -> None:
    """Forget all cached prompts; refused while a request still holds blocks, so tried again."""
    for _ in range(40):
        if json.loads(await fetch(session, f"{url}/reset_prefix_cache", "POST"))["success"]:
            return
        await asyncio.sleep(0.25)
    raise BenchError("/reset_prefix_cache kept failing: some request still holds blocks.")


async def watch(session: Any, url: str, readings: list[Reading], pause: float) -> None:
    """Read the gauges until cancelled."""
    while True:
        start = time.perf_counter()  # the clock of vLLM's client
        metrics = arithmetic.parse_metrics(await fetch(session, f"{url}/metrics"))
        running, usage = metrics["vllm:num_requests_running"], metrics["vllm:kv_cache_usage_perc"]
        readings.append(Reading(start, time.perf_counter(), running, usage))
        await asyncio.sleep(pause)


async def settled(session: Any, url: str, before: dict[str, float], count: int) -> dict[str, float]:
    """Metrics once the server has counted `count` more finished requests."""
    for _ in range(100):
        after = arithmetic.parse_metrics(await fetch(session, f"{url}/metrics"))
        if arithmetic.difference(before, after, "vllm:request_success_total") >= count:
            return after
        await asyncio.sleep(0.1)
    raise BenchError("The server has not counted its requests as finished after 10 s.")


async def describe(side: str, url: str) -> Server:
    """Ask a server for the size of its pool."""
    async with http_session() as session:
        config = arithmetic.parse_cache_config(await fetch(session, f"{url}/metrics"))
    num_blocks = int(config["num_gpu_blocks"])
    return Server(side, url, num_blocks, float(config["kv_cache_memory_bytes"]) / num_blocks)


async def wake(session: Any, server: Server, scenario: Scenario, common: dict[str, Any]) -> None:
    """Send a short request that counts nowhere.

    A server that was idle while the other one worked takes longer for its first steps.
    """
    from vllm.benchmarks.lib import endpoint_request_func as vllm_client

    before = arithmetic.parse_metrics(await fetch(session, f"{server.url}/metrics"))
    prompt = make_prompts(scenario, 0, 0, 1)[0][:WAKE_LEN]
    short = {**common, "output_len": WAKE_LEN, "prompt": prompt, "prompt_len": len(prompt)}
    request = vllm_client.RequestFuncInput(**short)
    await vllm_client.async_request_openai_completions(request, session)
    await settled(session, server.url, before, 1)


@dataclass(frozen=True)
class Run:
    """What one batch of requests gave; times in seconds of the client's clock."""

    outputs: list[Any]
    readings: list[Reading]
    duration: float
    counted: dict[str, float]


async def send(
    server: Server, scenario: Scenario, variant: str, prompts: list[list[int]], pause: float
) -> Run:
    """Send prompts at once, wait for all answers, and count."""
    from vllm.benchmarks.lib import endpoint_request_func as vllm_client

    common = {
        "model": scenario.model,
        "api_url": f"{server.url}/v1/completions",
        "output_len": scenario.output_len,
        "ignore_eos": True,
        "extra_body": {"temperature": 0.0, **arithmetic.request_extras(variant)},
    }
    inputs = [vllm_client.RequestFuncInput(prompt=p, prompt_len=len(p), **common) for p in prompts]
    readings: list[Reading] = []
    async with http_session() as session:
        await wake(session, server, scenario, common)
        await reset_prefix_cache(session, server.url)
        before = arithmetic.parse_metrics(await fetch(session, f"{server.url}/metrics"))
        watcher = asyncio.create_task(watch(session, server.url, readings, pause))
        start = time.perf_counter()
        outputs = await asyncio.gather(
            *(vllm_client.async_request_openai_completions(each, session) for each in inputs)
        )
        duration = time.perf_counter() - start
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        failed = [out for out in outputs if not out.success]
        if failed:
            reason = failed[0].error.strip().splitlines()[-1:] or ["no reason given"]
            raise BenchError(f"{variant}: {len(failed)} requests failed: {reason[0]}")
        after = await settled(session, server.url, before, len(prompts))
    counted = {key: arithmetic.difference(before, after, name) for key, name in COUNTERS.items()}
    check(scenario, variant, outputs, counted)
    return Run(outputs, readings, duration, counted)


def check(scenario: Scenario, variant: str, outputs: list[Any], counted: dict[str, float]) -> None:
    """Refuse a batch that did not do the work it stands for."""
    for out in outputs:
        found = (out.prompt_len, out.output_tokens)
        if found != (scenario.prompt_len, scenario.output_len):
            raise BenchError(f"{variant}: a request had {found} prompt and output tokens.")
    if counted["prefix_hit_tokens"]:
        raise BenchError(
            f"{variant}: {counted['prefix_hit_tokens']:g} prompt tokens came from the prefix "
            "cache, though it was reset."
        )


def make_prompts(scenario: Scenario, number: int, seed: int, count: int) -> list[list[int]]:
    """Token ids of a round's prompts: the same for all its variants."""
    random = np.random.default_rng([seed, number])
    shape = (count, scenario.prompt_len)
    top = MODELS[scenario.model]["vocab_size"]
    # Special tokens are the last ones of large vocabularies.
    return random.integers(FIRST_TOKEN_ID, top - top // 64, shape).tolist()


def probe(server: Server, scenario: Scenario, variant: str, seed: int) -> float:
    """KV bytes of one request alone at its end; also warms the variant up.

    A busy machine may read /metrics too seldom while the request is decoded. The request is sent
    again then, `PROBES` times in all: what it holds depends on its length alone.
    """
    prompts = make_prompts(scenario, 0, seed, 1)

    def held() -> float:
        run = asyncio.run(send(server, scenario, variant, prompts, pause=0.005))
        out = run.outputs[0]
        first, last = out.start_time + out.ttft, out.start_time + out.latency
        blocks = arithmetic.blocks_held(run.readings, first, last, server.num_blocks)
        return blocks * server.block_bytes

    for _ in range(PROBES - 1):
        try:
            return held()
        except ConfigError:
            continue
    return held()


def measure(
    server: Server, scenario: Scenario, variant: str, prompts: list[list[int]]
) -> dict[str, float]:
    """One batch of one variant, as metrics."""
    run = asyncio.run(send(server, scenario, variant, prompts, pause=0.2))
    steps = scenario.output_len - 1
    return {
        "throughput": len(prompts) * scenario.output_len / run.duration,
        "ttft": mean(out.ttft for out in run.outputs),
        "tpot": mean((out.latency - out.ttft) / steps for out in run.outputs),
        "duration": run.duration,
        **peaks(run.readings),
        **run.counted,
    }


def peaks(readings: Sequence[Reading]) -> dict[str, float]:
    """The highest of each gauge; nothing where no reading saw a request run.

    A busy machine answers so seldom that a batch may come and go between two of them.
    """
    seen = [each for each in readings if each.running]
    if not seen:
        return {}
    running, usage = max(each.running for each in seen), max(each.usage for each in seen)
    return {"peak_running": running, "peak_kv_usage": usage}
