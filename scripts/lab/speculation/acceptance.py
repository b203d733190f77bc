"""How many drafts over a compressed view the whole cache accepts, replayed on transformers.

Draft-then-verify with greedy drafts is a walk along the tokens that the model says over its whole
cache: draft k tokens behind the newest one, count how many of them, from the first on, are the
model's own, go forward by that count and one more (a verification always yields the token behind
the last one accepted). What the view holds changes the length of the strides, never the tokens.
``tests/lab/test_acceptance.py`` holds the strides against the engine's.

The replay never drafts less than k tokens: no `adaptive`, no `min_confidence`. It knows nothing of
the model's last position, and takes every view right after the prompt, as the engine does when its
pool has room.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.tasks.needle import NeedleSample

WORDS_CUT = 3
NUM_RESAMPLES = 4000


def plain_text(sample: NeedleSample) -> str:
    """A sample's filler alone, without needle and question, broken off inside a sentence.

    Its last three words are cut away: after a whole sentence the probe model asks for a number.
    """
    _, text, _ = sample.prompt.split("\n")
    return " ".join(text.replace(sample.needle, "").split()[:-WORDS_CUT])


@dataclass(frozen=True)
class Continuation:
    """What the model says over its whole cache.

    Attributes
    ----------
    tokens : list[int]
        N greedy tokens behind the prompt.
    keys, values : list[torch.Tensor]
        Per layer [1, KV, N - 1, D]: of all of them but the last, keys after RoPE.
    """

    tokens: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def continue_exactly(replay: Replay, prompt: Prefilled, num_tokens: int) -> Continuation:
    """Decode greedily over the whole cache.

    Parameters
    ----------
    replay : Replay
        The model.
    prompt : Prefilled
        One prompt.
    num_tokens : int
        Tokens to generate; a walk of n tokens with k drafts needs n + k - 1.
    """
    length = len(prompt.token_ids)
    cache, tokens = replay.view(prompt, None), [prompt.first_token]
    while len(tokens) < num_tokens:
        tokens.append(replay.next_token(cache, tokens[-1], length + len(tokens) - 1))
    return Continuation(
        tokens,
        [layer.keys[:, :, length:] for layer in cache.layers],
        [layer.values[:, :, length:] for layer in cache.layers],
    )


@dataclass(frozen=True)
class Walk:
    """The verifications of one request.

    Attributes
    ----------
    accepted : list[int]
        Drafts accepted by each verification, first verification first. The last one may reach
        beyond the tokens asked for, and counts in full, as it does in vLLM's own counters.
    num_drafts : int
        Drafts per verification; 0 where there is no view, so that every step yields one token.
    view_tokens : float
        Tokens of the prompt in the view, averaged over layers.
    """

    accepted: list[int]
    num_drafts: int
    view_tokens: float


@torch.inference_mode()
def walk(
    replay: Replay,
    prompt: Prefilled,
    continuation: Continuation,
    config: CompressionConfig,
    num_tokens: int,
    seed: int = 0,
) -> Walk:
    """Draft and verify until `num_tokens` are generated, the one that ends the prefill included.

    Parameters
    ----------
    replay : Replay
        The model.
    prompt : Prefilled
        One prompt.
    continuation : Continuation
        Of this prompt, at least ``num_tokens + config.draft.tokens - 1`` tokens.
    config : CompressionConfig
        Chooses the view, and the number of drafts.
    num_tokens : int
        Tokens to generate.
    seed : int, default 0
        See `seeds.prompt_seed`.

    Raises
    ------
    ValueError
        If the setting drafts in a way that is not replayed, or the continuation is too short.
    """
    num_drafts, tokens = config.num_draft_tokens, continuation.tokens
    if not num_drafts or config.draft.adaptive or config.draft.min_confidence:
        raise ValueError(
            'the replay needs the mode "draft" with draft.adaptive false and '
            f"draft.min_confidence 0, got the mode {config.mode!r} with {config.draft!r}"
        )
    if len(tokens) < num_tokens + num_drafts - 1:
        raise ValueError(
            f"num_tokens={num_tokens} with {num_drafts} drafts needs a continuation of "
            f"{num_tokens + num_drafts - 1} tokens, got {len(tokens)}"
        )
    length, cache = len(prompt.token_ids), replay.view(prompt, config, seed)
    held = [layer.keys.shape[2] for layer in cache.layers]
    if min(held) == length:  # no layer loses anything: nothing to draft over
        return Walk([0] * (num_tokens - 1), 0, length)
    accepted: list[int] = []
    exact = newest = 0  # tokens in the cache with exact keys; the one that was just verified
    while newest < num_tokens - 1:
        _append(cache, continuation, exact, newest)
        exact = newest
        count, num_written, token = 0, 0, tokens[newest]
        while count < num_drafts:
            token = replay.next_token(cache, token, length + newest + count)
            num_written += 1
            if token != tokens[newest + count + 1]:
                break  # what would be drafted behind it is rejected as well
            count += 1
        cache.crop(-num_written)  # a verification writes exact keys in their place
        accepted.append(count)
        newest += count + 1
    return Walk(accepted, num_drafts, sum(held) / len(held))


def _append(cache: DynamicCache, continuation: Continuation, start: int, end: int) -> None:
    """Append exact keys and values of the generated tokens [start, end) to every layer."""
    for index, rows in enumerate(zip(continuation.keys, continuation.values, strict=True)):
        keys, values = (each[:, :, start:end] for each in rows)
        cache.update(keys, values, index)


@dataclass(frozen=True)
class Acceptance:
    """Walks of several prompts taken together.

    Attributes
    ----------
    length : float
        Mean accepted length: tokens per verification.
    low, high : float
        Its 95 % interval: percentiles over resampled prompts (bootstrap).
    per_position : list[float]
        Share of the verifications that accepted the draft at position 1, ..., k, as vLLM's
        counters per position have it; of walks with a view, NaN if there is none.
    view_tokens : float
        Tokens of the prompt in the view, averaged over layers and prompts.
    num_prompts, num_steps : int
        Walks, and verifications in all of them.
    """

    length: float
    low: float
    high: float
    per_position: list[float]
    view_tokens: float
    num_prompts: int
    num_steps: int


def summarize(walks: Sequence[Walk], num_drafts: int, seed: int = 0) -> Acceptance:
    """Tokens over verifications of all walks, and how far that hinges on the prompts drawn.

    Prompts are what is resampled: verifications of one prompt depend on each other.

    Raises
    ------
    ValueError
        If there is no walk, or one drafted neither `num_drafts` tokens nor none.
    """
    if not walks or any(walk.num_drafts not in (0, num_drafts) for walk in walks):
        raise ValueError(f"num_drafts={num_drafts}: walks must be given and all draft so many")
    steps = np.array([len(walk.accepted) for walk in walks])
    tokens = np.array([sum(walk.accepted) for walk in walks]) + steps
    drawn = np.random.default_rng(seed).integers(len(walks), size=(NUM_RESAMPLES, len(walks)))
    low, high = np.percentile(tokens[drawn].sum(1) / steps[drawn].sum(1), [2.5, 97.5])
    drafted = [count for walk in walks if walk.num_drafts for count in walk.accepted]
    return Acceptance(
        length=float(tokens.sum() / steps.sum()),
        low=float(low),
        high=float(high),
        per_position=[
            sum(count >= position for count in drafted) / len(drafted) if drafted else math.nan
            for position in range(1, num_drafts + 1)
        ],
        view_tokens=sum(walk.view_tokens for walk in walks) / len(walks),
        num_prompts=len(walks),
        num_steps=int(steps.sum()),
    )
