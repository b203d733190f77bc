"""Train a small Llama that finds the one seven-digit number hidden in a text.

The model is a test instrument: small enough for two CPU cores, and yet it retrieves, so exact
answers before and after compressing its cache show what the compression costs. Four stages:

1. Dense key-value sequences teach it to copy digits; documents alone do so far too slowly.
2. Short documents with many numbers teach it the prompt format.
3. Documents with one number that grow from 512 to 4,096 tokens teach it distance.
4. The three longest lengths once more, at a lower learning rate.

    python scripts/train_probe_model.py --out my-probe
    python scripts/train_probe_model.py --resume my-probe --eval-only
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from lab.probe_model.learning import (
    ARCHITECTURE,
    PHASES,
    build_model,
    exact_answers,
    save,
    train_phase,
)
from lab.probe_model.texts import TextSource, docstring_sentences, train_tokenizer
from vllm_kvcompress.evaluation.provenance import versions


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for the model, the tokenizer and training.json")
    add("--tokenizer", type=Path, help="folder of a tokenizer to use instead of training one")
    add("--resume", type=Path, help="folder of a model and tokenizer to continue from")
    add("--eval-only", action="store_true", help="only evaluate the model given by --resume")
    add("--stages", default="1,2,3,4", help="stages of the table to run (default: %(default)s)")
    add("--steps-scale", type=float, default=1.0, help="factor on every number of steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads of torch")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    add("--text-weight", type=float, default=0.05, help="loss weight of all but the answers")
    add("--log-every", type=int, default=50, help="steps between two held-out checks")
    add("--eval-lengths", default="512,1024,2048,4096", help="tokens of the evaluation prompts")
    add("--eval-prompts", type=int, default=20, help="evaluation prompts per length")
    for name, default in ARCHITECTURE.items():
        add("--" + name.replace("_", "-"), type=int, default=default)
    add("--rope-theta", type=float, default=100_000.0)
    args = parser.parse_args(argv)
    if args.eval_only and args.resume is None:
        parser.error("--eval-only needs --resume DIR")
    if not args.eval_only and args.out is None:
        parser.error("--out DIR is required for training")
    if unknown := set(args.stages.split(",")) - {str(p.stage) for p in PHASES}:
        parser.error(f"--stages {args.stages}: no stage {', '.join(sorted(unknown))}; use 1 to 4")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and write the report."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    sentences = docstring_sentences()
    held_sentences = sentences[::10]
    sentences = [s for i, s in enumerate(sentences) if i % 10]
    if folder := args.tokenizer or args.resume:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(sentences, args.vocab_size)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        model = build_model(args, len(tokenizer))
    model.to(args.device)
    print(f"{model.num_parameters():,} parameters, {len(sentences):,} training sentences")

    began, phases = time.perf_counter(), []
    train = TextSource(tokenizer, sentences, args.seed)
    held = TextSource(tokenizer, held_sentences, args.seed + 1)
    for phase in PHASES:
        if args.eval_only or str(phase.stage) not in args.stages.split(","):
            continue
        steps = max(1, round(phase.steps * args.steps_scale))
        trace = train_phase(model, phase, steps, train, held, args)
        phases.append({**asdict(phase), "steps": steps, "trace": trace})
        save(model, tokenizer, args.out)
    answers = []
    for length in map(int, args.eval_lengths.split(",")):
        answers.append(exact_answers(model, held, length, args.eval_prompts))
        print(answers[-1], flush=True)
    if args.eval_only:
        return
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {
        "settings": settings,
        "versions": versions(("torch", "transformers", "tokenizers")),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - began, 1),
        "phases": phases,
        "exact_answers": answers,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
