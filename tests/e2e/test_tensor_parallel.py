"""Two tensor-parallel ranks, one KV head each, give what one rank with both heads gives."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import ray_on_cpu
from tests.e2e.eight_bits import EightBitReplay, needs_eight_bits
from tests.e2e.tensor_parallel_run import EIGHT
from tests.forked import FORKED
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("tensor_parallel_run.py")


def run(
    model: str, num_ranks: int, mode: str, *executor: str, own: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    environment = {
        **own,
        # The Ray cluster belongs to the script's process, so the engine must be there.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if executor else "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the script sends its workers functions
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(num_ranks)),
    }
    done = subprocess.run(
        [sys.executable, str(FORKED), str(SCRIPT), model, str(num_ranks), mode, *executor],
        capture_output=True,
        text=True,
        timeout=900,  # both cores may be busy with other things
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    if mode == "draft" and num_ranks > 1:
        assert "the engine has ended" in done.stdout
        reason = "drafting for requests 8-\\w+ failed on rank 1 alone"
        assert re.search(reason, done.stdout + done.stderr)
    return json.loads(line)


needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")


@needs_two_cores
def test_two_ranks_give_the_tokens_of_one(probe_model: str) -> None:
    one, two = (run(probe_model, num_ranks, "evict") for num_ranks in (1, 2))
    assert two == one
    for policy in one["tokens"]:
        assert one["counts"][f"kv_compression_requests/{policy}"] == 2, one["counts"]
    # Second turns go on from the compressed caches of both ranks.
    reused = [cached for turns in one["turns"].values() for cached, _ in turns]
    assert len(reused) == 4 and all(cached > 1400 for cached in reused)
    # So do questions over a text, from what is kept of it; and samples read one copy.
    (_, *prefix), samples = one["readers"]["shared prefix"], one["readers"]["samples"]
    assert all(cached > 1400 for cached, _ in prefix), prefix
    assert dict(one["readers"]["outcomes"]) == {"computed": 1, "reused": 2}
    assert len({tuple(said) for _, said in samples}) == 1, samples
    # Both heads of the first layer, two prompts of which it keeps a third: of all ranks together.
    assert one["counts"]["kv_compression_codebook_vectors/key"] > 2 * 2 * 400


@needs_two_cores
def test_two_ranks_draft_and_accept_what_one_does(probe_model: str) -> None:
    """Views that are copies, and views of the request's own blocks (windowkv_qwen2.5), renewed."""
    one, two = (run(probe_model, num_ranks, "draft") for num_ranks in (1, 2))
    # How many of them a failure meets is for the clock to say, which request reached the engine.
    failures = [each.pop("failures") for each in (one, two)]
    assert two == one
    counts = one["counts"]
    accepted = counts["spec_decode_num_accepted_tokens"]
    assert 0 < accepted < counts["spec_decode_num_draft_tokens"], "views show in what is accepted"
    assert one["tokens"]["snapkv"] == one["tokens"]["windowkv_qwen2.5"], "and not in the tokens"
    for policy in ("snapkv", "windowkv"):
        assert counts[f"kv_compression_views/{policy}/prompt"] == 2
        assert counts[f"kv_compression_views/{policy}/refresh"] >= 2
    # Where drafting fails on both ranks, they go on without drafts, and later requests draft.
    assert one["failed"] == 2 * one["tokens"]["snapkv"]
    assert set(failures) <= {1, 2}


@needs_two_cores
@needs_eight_bits
def test_two_ranks_over_a_cache_of_eight_bits(probe_model: str, tokenize) -> None:
    """With four layer groups and n-gram drafts; against transformers over the same survivors."""
    two = run(probe_model, 2, "eight")
    replay = EightBitReplay(probe_model)
    server = parse_config({"preset": "pyramidkv", **EIGHT})
    assert server is not None
    prompts = [tokenize(sample.prompt) for sample in make_samples(2, 700, tokenize, seed=11)]
    for preset, found in two["tokens"].items():
        own = parse_request({} if preset == "pyramidkv" else {"kv_compression": preset})
        setting = resolve_request(server, own, None)
        expected = [replay.generate(replay.prefill(each), setting, 24) for each in prompts]
        assert found == expected, preset
        assert found != [replay.generate(replay.prefill(each), None, 24) for each in prompts]
    for policy in ("snapkv", "keydiff"):  # the preset pyramidkv has SnapKV's scores
        assert two["counts"][f"kv_compression_requests/{policy}"] == 2, two["counts"]
    assert two["counts"]["spec_decode_num_accepted_tokens"] > 0


@needs_two_cores
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install ray, which nothing here needs otherwise",
)
def test_two_workers_of_ray_give_the_tokens_of_one(
    probe_model: str, root: Path, tmp_path: Path
) -> None:
    """Ray's actors load the plugin, build its workers, and get its plans."""
    own = dict(ray_on_cpu.environment(tmp_path))
    own["PYTHONPATH"] = os.pathsep.join([str(root), own["PYTHONPATH"]])
    one, two = run(probe_model, 1, "few"), run(probe_model, 2, "few", "ray", own=own)
    assert two == one
    for policy in one["tokens"]:
        assert one["counts"][f"kv_compression_requests/{policy}"] == 2, one["counts"]
