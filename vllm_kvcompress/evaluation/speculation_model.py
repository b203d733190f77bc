"""What drafting over a view is worth: bytes that decoding reads, and the times they imply.

Decoding on a GPU waits for memory. A step reads the weights once and the keys and values of every
request once, however few tokens it computes; a verify pass of k + 1 tokens reads no more than a
plain step. So time is counted in bytes, and FLOPs only say when that stops being true.

Only what grows with the model or the context is counted: matrices, keys and values. Activations,
block tables, norms, writes, launches and the host are left out, so every speed-up here is what
memory allows, not what a run will show.

    W   bytes of weights that a pass reads
    n   bytes of keys and values per token, all layers
    B   requests, C tokens of context each, t generated tokens behind the context ("tail")
    r   share of the context in the view, k draft tokens per step
    L   accepted length: tokens a request gains per step, from 1 to k + 1

    plain step    W + B (C + t) n
    draft step    W + B (r C + t) n
    verify pass   W + B (C + t) n
    speed-up      L plain / (k draft + verify)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.evaluation.serving_models import MODELS

H200_BANDWIDTH = 4.8e12
"""Bytes per second, from NVIDIA's data sheet of the H200 SXM."""

H200_BF16_FLOPS = 989e12
"""FLOPs per second in bfloat16 without sparsity, from the same sheet."""


@dataclass(frozen=True)
class ModelShape:
    """What the size of a decoder-only transformer with grouped queries depends on.

    Attributes
    ----------
    num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size : int
        As in config.json.
    weight_bytes, cache_bytes : float
        Bytes per weight and per element of the cache.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    weight_bytes: float = 2
    cache_bytes: float = 2

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], weight_bytes: float = 2, cache_bytes: float = 2
    ) -> "ModelShape":
        """Shape of a Hugging Face config of a Llama or Qwen3 model."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            weight_bytes=weight_bytes,
            cache_bytes=cache_bytes,
        )

    @property
    def num_step_weights(self) -> int:
        """Weights that a pass multiplies with: projections, MLPs, and the head at the end.

        The table of input embeddings is looked up, a row per token, and not read.
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @property
    def pass_weight_bytes(self) -> float:
        """Bytes of weights that one pass reads."""
        return self.num_step_weights * self.weight_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.cache_bytes

    @property
    def attention_flops(self) -> int:
        """FLOPs of one query token against one key and value, in all layers and heads."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


SHAPES = {name: ModelShape.from_config(MODELS[name]) for name in ("llama-3-8b", "qwen3-8b")}
"""In bfloat16, weights and cache."""


@dataclass(frozen=True)
class Work:
    """What one pass of the model reads and computes.

    Attributes
    ----------
    weight_bytes, kv_bytes : float
        Bytes read.
    linear_flops, attention_flops : float
        Of the matrices, and of attention.
    """

    weight_bytes: float
    kv_bytes: float
    linear_flops: float
    attention_flops: float

    @property
    def num_bytes(self) -> float:
        """Bytes read, in all."""
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> float:
        """FLOPs, in all."""
        return self.linear_flops + self.attention_flops

    def seconds(self, bandwidth: float, flops_rate: float = math.inf) -> float:
        """Least time: matrices and attention one after the other, each at its own limit.

        Parameters
        ----------
        bandwidth, flops_rate : float
            Peak rates in bytes and FLOPs per second.
        """
        linear = max(self.weight_bytes / bandwidth, self.linear_flops / flops_rate)
        attention = max(self.kv_bytes / bandwidth, self.attention_flops / flops_rate)
        return linear + attention

    def is_memory_bound(self, bandwidth: float, flops_rate: float) -> tuple[bool, bool]:
        """Whether the matrices, and whether attention, wait for memory at these peak rates."""
        ridge = flops_rate / bandwidth
        return (
            self.linear_flops < self.weight_bytes * ridge,
            self.attention_flops < self.kv_bytes * ridge,
        )


def accepted_length(probability: float, num_drafts: int) -> float:
    """Tokens per step if each draft is accepted with this probability once all before it were."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be from 0 to 1, got {probability}")
    return sum(probability**index for index in range(num_drafts + 1))


@dataclass(frozen=True)
class Speculation:
    """One way of drafting, and what it reads.

    Attributes
    ----------
    shape : ModelShape
        The model.
    batch : int
        Requests.
    context : int
        Tokens of each request that the view stands for (its prompt).
    view_ratio : float
        Share of the context in the view.
    num_drafts : int
        Draft tokens per step.
    tail : int
        Tokens behind the context, which the view holds whole.
    """

    shape: ModelShape
    batch: int
    context: int
    view_ratio: float
    num_drafts: int
    tail: int = 0

    def _work(self, tokens_read: float, tokens_computed: int) -> Work:
        """Every one of `tokens_computed` per request attends to `tokens_read` of its request."""
        kv_tokens = self.batch * tokens_read
        return Work(
            weight_bytes=self.shape.pass_weight_bytes,
            kv_bytes=kv_tokens * self.shape.kv_token_bytes,
            linear_flops=2 * self.shape.num_step_weights * self.batch * tokens_computed,
            attention_flops=self.shape.attention_flops * kv_tokens * tokens_computed,
        )

    @property
    def plain_step(self) -> Work:
        """One token per request over the whole cache."""
        return self._work(self.context + self.tail, 1)

    @property
    def draft_step(self) -> Work:
        """One token per request over view and tail."""
        return self._work(self.view_ratio * self.context + self.tail, 1)

    @property
    def verify_pass(self) -> Work:
        """k + 1 tokens per request over the whole cache, which is read once for all of them."""
        return self._work(self.context + self.tail, self.num_drafts + 1)

    @property
    def view_bytes(self) -> float:
        """Memory that views hold beside the whole cache."""
        return self.batch * self.view_ratio * self.context * self.shape.kv_token_bytes

    def bytes_per_token(self, mode: str, length: float = 1.0) -> float:
        """Bytes read per token that a request gains.

        Parameters
        ----------
        mode : {"plain", "given", "draft"}
            "given": drafts cost nothing (n-gram), each step is one verify pass. "draft": k draft
            steps and a verify pass.
        length : float
            Accepted length; 1 for "plain".
        """
        total = {
            "plain": self.plain_step.num_bytes,
            "given": self.verify_pass.num_bytes,
            "draft": self.num_drafts * self.draft_step.num_bytes + self.verify_pass.num_bytes,
        }[mode]
        return total / (self.batch * length)

    def speed_up(
        self,
        length: float,
        mode: str = "draft",
        bandwidth: float = 1.0,
        flops_rate: float = math.inf,
    ) -> float:
        """Over plain decoding at an accepted length; by bytes alone where no rates are given."""
        rates = bandwidth, flops_rate
        step = self.verify_pass.seconds(*rates)
        if mode == "draft":
            step += self.num_drafts * self.draft_step.seconds(*rates)
        return length * self.plain_step.seconds(*rates) / step

    @property
    def limit(self) -> float:
        """Upper limit of the speed-up: every draft accepted, by bytes."""
        return self.speed_up(self.num_drafts + 1)

    def needed_length(self, target: float = 1.0) -> float:
        """Accepted length at which the speed-up is `target`, by bytes; may be above k + 1."""
        return target / self.speed_up(1.0)

    def tokens_to_pay(self, length: float, target: float = 1.0) -> float | None:
        """Context x batch, in tokens, from which on the speed-up is `target`, by bytes.

        The speed-up depends on the product alone; the tail is left out here.

        Returns
        -------
        float or None
            0 where it pays at any size, None where it pays at none.
        """
        # length (W + x n) >= target (k (W + r x n) + W + x n), solved for x.
        k = self.num_drafts
        gain = length - target * (1 + k * self.view_ratio)
        loss = target * (1 + k) - length
        if loss <= 0 and gain >= 0:
            return 0.0
        if gain <= 0:
            return None
        return loss * self.shape.pass_weight_bytes / (gain * self.shape.kv_token_bytes)

    def largest_batch(self, memory: float, reserve: float = 0.0, views: bool = True) -> int:
        """Requests whose caches fit beside the weights, with a view each or without.

        Parameters
        ----------
        memory, reserve : float
            Bytes of the device, and those of them for anything else.
        """
        weights = self.shape.pass_weight_bytes
        weights += self.shape.vocab_size * self.shape.hidden_size * self.shape.weight_bytes
        tokens = (1 + (self.view_ratio if views else 0)) * self.context + self.tail
        free = memory - reserve - weights
        return max(math.floor(free / (tokens * self.shape.kv_token_bytes)), 0)
