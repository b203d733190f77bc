"""The server's own numbers, from its /metrics."""

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from lab.errors import RunError

READ_METRICS = ("vllm:kv_c", "vllm:cache_config_info")


def parse_metrics(text: str) -> list[Sample]:
    """Samples of a Prometheus text, of the metrics this demo reads: all of them take too long."""
    lines = [line for line in text.splitlines() if any(name in line for name in READ_METRICS)]
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return [sample for family in families for sample in family.samples]


def total(samples: list[Sample], name: str) -> float:
    """Sum of a metric over all its labels; 0 if it is missing."""
    return sum(s.value for s in samples if s.name == name)


def evicted_per_group(samples: list[Sample]) -> dict[int, int]:
    """Tokens evicted so far in every layer group, summed over policies."""
    counts: dict[int, int] = {}
    for sample in samples:
        if sample.name == "vllm:kv_compression_tokens_evicted_total":
            group = int(sample.labels["layer_group"])
            counts[group] = counts.get(group, 0) + int(sample.value)
    return counts


def kept_per_group(before: list[Sample], after: list[Sample], prompt_tokens: int) -> list[int]:
    """Prompt tokens one request kept in every layer group, from counters around it."""
    old, new = evicted_per_group(before), evicted_per_group(after)
    return [prompt_tokens - (new[group] - old.get(group, 0)) for group in sorted(new)]


def cache_config(samples: list[Sample]) -> dict[str, str]:
    """What the server says about its KV cache."""
    for sample in samples:
        if sample.name == "vllm:cache_config_info":
            return sample.labels
    raise RunError("The server's /metrics have no vllm:cache_config_info.")


def blocks_held(samples: list[Sample]) -> int:
    """Blocks in use now. vLLM's gauge leaves out the one block that is never handed out."""
    usable = int(cache_config(samples)["num_gpu_blocks"]) - 1
    return round(total(samples, "vllm:kv_cache_usage_perc") * usable)


def block_bytes(samples: list[Sample]) -> float:
    """Size of one block: vLLM divides the memory it was given by the size of a block."""
    config = cache_config(samples)
    return float(config["kv_cache_memory_bytes"]) / int(config["num_gpu_blocks"])
