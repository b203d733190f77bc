"""What drafting over a view is worth: bytes that decoding reads, and the times they imply.

Decoding on a GPU waits for memory. A step reads the weights once and the keys and values of every
request once, however few tokens it computes; a verify pass of k + 1 tokens reads no more than a
plain step. So time is counted in bytes, and FLOPs only say when that stops being true.

Only what grows with the model or the context is counted: matrices, keys and values; launches where
a machine is given. Activations, block tables, norms and what the host computes are left out, and
writes where only bytes are compared, so every speed-up here is what memory allows, not what a run
will show. (The idea of the gain per verify pass: Leviathan et al., arXiv 2211.17192, section 3;
there a draft model of its own drafts.)

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
from dataclasses import dataclass

from vllm_kvcompress.speed.machine import Machine
from vllm_kvcompress.speed.passes import decode_step
from vllm_kvcompress.speed.paths import Path, Stage
from vllm_kvcompress.speed.shapes import ModelShape

DRAFT_LAUNCHES = 16
"""Of a draft step with greedy drafts, backends' metadata left out: the model's graph; 12 that write
its inputs (``worker/draft/step.py``); 3 that keep its drafts (``worker/draft/speculator.py``)."""

BEGIN_LAUNCHES = 31
"""Once for all drafts of a step, in one layer group, where nothing was evicted and no view was
taken: which rows draft and from where, their views' block tables and lengths, flags of NaN and
their copy to the host (``_propose`` of ``worker/draft/speculator.py``)."""


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
    tail : float
        Tokens behind the context, which the view holds whole.
    """

    shape: ModelShape
    batch: int
    context: int
    view_ratio: float
    num_drafts: int
    tail: float = 0

    @property
    def plain_step(self) -> Path:
        """One token per request over the whole cache."""
        return decode_step(self.shape, self.batch, self.context + self.tail)

    @property
    def draft_step(self) -> Path:
        """One token per request over view and tail."""
        slots = self.view_ratio * self.context + self.tail
        return decode_step(self.shape, self.batch, slots, launches=DRAFT_LAUNCHES)

    @property
    def verify_pass(self) -> Path:
        """k + 1 tokens per request over the whole cache, which is read once for all of them."""
        slots = self.context + self.tail
        return decode_step(self.shape, self.batch, slots, queries=self.num_drafts + 1)

    @property
    def step(self) -> Path:
        """All of a step: what begins it, k draft steps and a verify pass."""
        begin = Path((Stage("drafts", launches=BEGIN_LAUNCHES),))
        return Path.of([begin, self.draft_step.times(self.num_drafts), self.verify_pass])

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
            "plain": self.plain_step.read,
            "given": self.verify_pass.read,
            "draft": self.step.read,
        }[mode]
        return total / (self.batch * length)

    def speed_up(self, length: float, mode: str = "draft", machine: Machine | None = None) -> float:
        """Over plain decoding at an accepted length; by bytes read where no machine is given."""
        if machine is None:
            return self.bytes_per_token("plain") / self.bytes_per_token(mode, length)
        step = self.step if mode == "draft" else self.verify_pass
        return length * self.plain_step.seconds(machine) / step.seconds(machine)

    @property
    def limit(self) -> float:
        """Upper limit of the speed-up: every draft accepted, by bytes."""
        return self.speed_up(self.num_drafts + 1)

    def needed_length(self, target: float = 1.0, machine: Machine | None = None) -> float:
        """Accepted length at which the speed-up is `target`; may be above k + 1."""
        return target / self.speed_up(1.0, machine=machine)

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
        tokens = (1 + (self.view_ratio if views else 0)) * self.context + self.tail
        free = memory - reserve - self.shape.resident_bytes
        return max(math.floor(free / (tokens * self.shape.kv_token_bytes)), 0)
