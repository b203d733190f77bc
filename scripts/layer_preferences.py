"""Measure CAKE's layer preferences (arXiv 2503.12491) and print them as a layer budget.

    python scripts/layer_preferences.py --model examples/probe-model --groups 4
    python scripts/layer_preferences.py --model DIR --groups 8 --prompts prompts.txt

The paper measures every prompt while it is prefilled. Here lengths must be known beforehand, so the
preferences are measured once, on typical prompts (one per line; needle prompts if none are given),
averaged, and put into the configuration. Hugging Face transformers, CPU; Llama-like models.
"""

import argparse
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer

from vllm_kvcompress.budgets import layer_groups
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.kernels.layer_preference import layer_preference
from vllm_kvcompress.settings import LayerGroupsConfig


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", type=int, required=True, help="layer_groups.count")
    parser.add_argument("--prompts", type=Path, help="one prompt per line")
    parser.add_argument("--window", type=int, default=32, help="queries, as in the paper")
    parser.add_argument("--tau1", type=float, default=1.0)
    parser.add_argument("--tau2", type=float, default=1.0)
    args = parser.parse_args()
    replay, tokenizer = Replay(args.model), AutoTokenizer.from_pretrained(args.model)
    if args.prompts:
        prompts = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
    else:
        prompts = [sample.prompt for sample in make_samples(4, 2000, tokenizer.encode, seed=5)]
    totals = torch.zeros(len(replay.layers))
    for prompt in prompts:
        found = replay.prefill(tokenizer.encode(prompt))
        each = [
            layer_preference(
                queries[:, -args.window :],
                keys,
                replay.layers[index].self_attn.scaling,
                args.tau1,
                args.tau2,
            )
            for index, (queries, keys) in enumerate(zip(found.queries, found.keys, strict=True))
        ]
        totals += torch.stack(each) / sum(each)
    groups = layer_groups(len(totals), LayerGroupsConfig(count=args.groups))
    members = [
        [
            float(total) / len(prompts)
            for total, group in zip(totals, groups, strict=True)
            if group == g
        ]
        for g in range(max(groups) + 1)
    ]
    setting = {
        "layer_groups": {"count": len(members)},
        "layer_budget": {
            "shape": "preference",
            "preferences": [round(sum(shares) / len(shares), 4) for shares in members],
        },
    }
    print(yaml.safe_dump(setting, sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
