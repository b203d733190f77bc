"""The model, its loss, one phase of its training, and what it answers."""

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lab.probe_model.texts import ANSWER, IGNORE, NUM_DIGITS, TextSource

# Shape of the model; every entry is a field of LlamaConfig and a command-line option.
ARCHITECTURE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Phase:
    """One row of the training table.

    Parameters
    ----------
    stage : int
        Stage of the recipe the row belongs to; ``--stages`` selects by it.
    kind : str
        ``dense`` (key-value pairs), ``many`` (documents with 2 to 5 numbers) or ``single``
        (documents with one number, 15 % with two or three).
    length, batch, steps : int
        Longest sequence in tokens, sequences per step, optimiser steps.
    lr : float
        Peak learning rate; every phase warms up, then follows a cosine to a tenth.
    dense_share : float
        Share of the steps that use a batch of the first phase instead.
    """

    stage: int
    kind: str
    length: int
    batch: int
    steps: int
    lr: float
    dense_share: float = 0.0


PHASES = (
    Phase(1, "dense", 96, 24, 600, 2e-3),
    Phase(2, "many", 256, 24, 2000, 1.5e-3, dense_share=0.5),
    Phase(3, "single", 512, 4, 600, 1e-3),
    Phase(3, "single", 1024, 4, 500, 1e-3),
    Phase(3, "single", 2048, 2, 400, 1e-3),
    Phase(3, "single", 4096, 1, 350, 1e-3),
    Phase(4, "single", 1024, 4, 480, 6e-4),
    Phase(4, "single", 2048, 2, 480, 6e-4),
    Phase(4, "single", 4096, 1, 480, 6e-4),
)


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """Return a freshly initialised Llama with tied embeddings."""
    sizes = {name: getattr(args, name) for name in ARCHITECTURE} | {"vocab_size": vocab_size}
    rope = {"rope_theta": args.rope_theta, "rope_type": "default"}
    other: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    # Narrow layers need more than the usual 0.02: with it nothing was copied after 400 steps.
    other["initializer_range"] = args.hidden_size**-0.5
    config = LlamaConfig(**sizes, **other, rope_parameters=rope, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def forward_loss(
    model: Any, ids: torch.Tensor, roles: torch.Tensor, text_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss and its parts; the logits are computed only where they are needed.

    Parameters
    ----------
    model : LlamaForCausalLM
        Model under training.
    ids, roles : torch.Tensor
        Token ids and their roles, both [batch, length].
    text_weight : float
        Weight of the mean loss on TEXT tokens; ANSWER tokens have weight 1.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets, roles = ids[:, 1:], roles[:, 1:]
    used = roles != IGNORE
    logits = model.lm_head(hidden[used]).float()  # [num_used, vocab]
    entropy = F.cross_entropy(logits, targets[used], reduction="none")
    is_answer = roles[used] == ANSWER
    loss = answer_loss = entropy[is_answer].mean()
    if not is_answer.all():
        loss = answer_loss + text_weight * entropy[~is_answer].mean()
    correct = (logits.detach().argmax(-1) == targets[used])[is_answer]
    in_answer = roles == ANSWER
    starts = in_answer & ~F.pad(in_answer, (1, 0))[:, :-1]  # first token of every answer
    answer_index = (starts.flatten().cumsum(0) - 1)[in_answer.flatten()]
    wrong = torch.bincount(answer_index, weights=(~correct).float())
    return loss, {
        "answer_loss": answer_loss.item(),
        "tokens": correct.float().mean().item(),
        "exact": (wrong == 0).float().mean().item(),
    }


def train_phase(
    model: Any, phase: Phase, steps: int, train: TextSource, held: TextSource, args: Any
) -> list[dict[str, float]]:
    """Run one phase and return its trace of training loss and held-out accuracy."""
    device, first = next(model.parameters()).device, PHASES[0]
    # On a CPU the backward pass of SDPA takes twice as long on short sequences.
    model.set_attn_implementation("eager" if phase.length <= 512 else "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98))
    warmup = max(1, min(20, steps // 10))

    def factor(step: int) -> float:
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        return min(1.0, (step + 1) / warmup) * cosine

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    held_ids, held_roles = held.batch(phase.kind, phase.length, max(8, phase.batch))
    trace, losses, began = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        drawn = first if train.rng.random() < phase.dense_share else phase
        ids, roles = train.batch(drawn.kind, drawn.length, drawn.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, _ = forward_loss(model, ids.to(device), roles.to(device), args.text_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step % args.log_every == 0 or step == steps:
            with torch.no_grad():
                _, scores = forward_loss(model, held_ids.to(device), held_roles.to(device), 0.0)
            row = {"step": step, "train_loss": sum(losses) / len(losses), **scores}
            row["seconds"] = time.perf_counter() - began
            trace.append({name: round(value, 4) for name, value in row.items()})
            print(f"stage {phase.stage} {phase.kind} {phase.length}:", trace[-1], flush=True)
            losses = []
    return trace


@torch.no_grad()
def exact_answers(model: Any, source: TextSource, length: int, num_prompts: int) -> dict[str, Any]:
    """Count the prompts whose whole answer greedy decoding would give.

    One forward pass per prompt is enough: greedy decoding repeats the answer exactly if and only
    if every one of its tokens, the space before the digits included, is the most likely one after
    the correct tokens before it. Half of the prompts are sentences, half are the noise line.
    """
    device, exact, sizes = next(model.parameters()).device, [], []
    for index in range(num_prompts):
        ids, roles = source.encode(*source.document(length, noise=index % 2 == 1))
        first = roles.index(ANSWER)  # the space
        end = first + 1 + NUM_DIGITS
        inputs = torch.tensor([ids[: end - 1]], device=device)
        logits = model(input_ids=inputs, logits_to_keep=1 + NUM_DIGITS, use_cache=False).logits
        exact.append(logits[0].argmax(-1).tolist() == ids[first:end])
        sizes.append(first)
    return {
        "length": length,
        "mean_prompt_tokens": round(sum(sizes) / num_prompts, 1),
        "prompts": num_prompts,
        "exact": sum(exact),
        "exact_sentences": sum(exact[0::2]),
        "exact_noise": sum(exact[1::2]),
    }


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the weights in bfloat16 and the tokenizer; the model in memory stays as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
