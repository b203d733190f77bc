"""Two tensor-parallel ranks of latent attention (MLA) hold one cache twice, and half the heads.

They keep the same tokens, those that all heads together pay most attention to: what transformers
say over these is what both say together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.places import importable
from lab.random_models import write_random_model
from tests.e2e.latent_ranks_run import NUM_TOKENS, POLICIES, PROMPTS, RATIO
from tests.forked import FORKED
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.replay_latent import LatentReplay
from vllm_kvcompress.evaluation.seeds import prompt_seed

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("latent_ranks_run.py")
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks_keep_what_all_heads_attend_to(tmp_path: Path) -> None:
    model = str(write_random_model(tmp_path, "deepseek_v3"))
    done = subprocess.run(
        [sys.executable, str(FORKED), str(SCRIPT), model, "2"],
        capture_output=True,
        text=True,
        timeout=600,
        env={
            **os.environ,
            **importable(ROOT),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    found = json.loads(line)["tokens"]
    replay = LatentReplay(model, 16)
    for number, prompt in enumerate(PROMPTS):
        prefilled = replay.prefill(prompt)
        whole = replay.generate(prefilled, None, NUM_TOKENS)
        for policy in POLICIES:
            config = parse_config({"preset": policy, "budget": {"ratio": RATIO}})
            expected = replay.generate(prefilled, config, NUM_TOKENS, prompt_seed(prompt))
            assert found[policy][number] == expected != whole, policy
