"""Tokens of a tiny hybrid model on vLLM beside those of transformers over the same survivors.

    python scripts/hybrid_tokens.py nemotron_h

Without prefix caching, with which vLLM 0.32 does not run Mamba 2 models on a CPU, and in float32,
for which linear attention has lab/delta_rule.py; LFM2 has lab/torch_rotary.py.
"""

import argparse
import tempfile
from contextlib import ExitStack

from lab.delta_rule import in_any_precision
from lab.random_hybrids import HYBRIDS, write_random_hybrid
from lab.random_models import distinct_tokens
from lab.text_of_multimodal import served_as_text
from lab.torch_rotary import rotary_in_torch

SETTING = {"preset": "snapkv", "budget": {"ratio": 0.25, "floor": 1}, "min_prompt_len": 64}
PROMPT_LEN, NUM_TOKENS = 500, 12


def main() -> int:
    """Print both, compressed and not; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=HYBRIDS)
    name = parser.parse_args().model
    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.evaluation.engine import Engine
    from vllm_kvcompress.evaluation.replay import Replay

    differ, prompt = False, distinct_tokens(PROMPT_LEN)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if name.startswith("qwen3"):
            stack.enter_context(served_as_text(name.removesuffix("_moe")))
            stack.enter_context(in_any_precision())
        if name == "lfm2":
            stack.enter_context(rotary_in_torch())
        model = str(write_random_hybrid(folder, name))
        engine = Engine(
            model, SETTING, dtype="float32",
            skip_tokenizer_init=True, max_model_len=1024, max_num_batched_tokens=160,
            enable_prefix_caching=False,
        )  # fmt: skip
        block_size = engine.engine.vllm_config.cache_config.block_size
        replay = Replay(model, block_size, engine.runner.dtype)
        prefilled = replay.prefill(prompt)
        for setting, xargs in ((SETTING, None), (None, {"kv_compression": "none"})):
            (found,) = engine.generate([prompt], NUM_TOKENS, xargs, ignore_eos=True)
            config = None if setting is None else parse_config(setting)
            wanted = replay.generate(prefilled, config, NUM_TOKENS)
            title = "whole" if setting is None else "compressed"
            print(f"{title}, blocks of {block_size}\n  vLLM         {found}")
            print(f"  transformers {wanted}\n  {'equal' if found == wanted else 'different'}")
            differ |= found != wanted
        engine.close()
    return int(differ)
