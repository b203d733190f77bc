"""What a policy's scoring costs, found by letting the policy score tensors without data.

A policy is run once per size on torch's meta device, where an operation has shapes and no numbers;
the measurements that it asks its `CacheRows` for are replaced by what their kernels move, and every
other operation of torch is counted with what it reads and writes. So this needs no table of
policies, and serves those of other packages. A policy must not wait for the device, so nothing in
it can ask for a number.

Operations are counted as launches: one each, none for views and for new memory. What torch does in
several kernels (a sort) or in none counts as one. Dimensions: H query heads, KV key-value heads, w
queries, n tokens, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.cache.rows import CacheRows, window_means
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.speed import kernel_bytes
from vllm_kvcompress.speed.kernel_bytes import Heads, Launch
from vllm_kvcompress.speed.passes import CHUNK_TOKENS

META = torch.device("meta")
_NEW_MEMORY = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}
_NO_COPY = {"_unsafe_view", "_reshape_alias"}  # views that their schema does not call so
_WHOLE = {torch.ops.aten.detach.default}  # decomposes into itself


def is_launch(func: Any) -> bool:
    """Whether an operator of torch runs something on the device: it makes no view, and no room."""
    name = func.overloadpacket.__name__
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not (is_view or name in _NEW_MEMORY or name in _NO_COPY)


class OperationCounter(TorchDispatchMode):
    """Counts operators of torch on one device, with their bytes and FLOPs.

    Parameters
    ----------
    device : torch.device
        Operators none of whose tensors are there are not counted.

    Attributes
    ----------
    operations : int
        Launches.
    read, written, flops : float
        Bytes of what goes in and comes out; FLOPs of matrix products.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations = 0
        self.read = self.written = self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count it, or those that it is made of."""
        kwargs = kwargs or {}
        if func not in _WHOLE:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        given, made = _tensors((args, kwargs)), _tensors(found)
        if is_launch(func) and any(each.device == self.device for each in (*given, *made)):
            self.operations += 1
            self.read += sum(map(_size, given))
            self.written += sum(map(_size, made))
            count = flop_registry.get(func.overloadpacket)
            self.flops += count(*args, **kwargs, out_val=found) if count else 0
        return found

    def launch(self) -> Launch:
        """What was counted."""
        return Launch(self.read, self.written, self.flops, kernels=0, operations=self.operations)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes; an expanded tensor has those of what it repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@dataclass(frozen=True)
class ScoringCost:
    """One request's scoring of one layer.

    Attributes
    ----------
    measurements : dict[str, Launch]
        By name, the kernels that measure the cache in place.
    operations : Launch
        Torch operations of the policy.
    """

    measurements: dict[str, Launch]
    operations: Launch

    @property
    def launches(self) -> list[Launch]:
        """All of it."""
        return [*self.measurements.values(), self.operations]


class RecordedRows(CacheRows):
    """Rows without data that note what is measured on them, as `PagedRows` has it measured.

    Parameters
    ----------
    heads : Heads
        Of the layer.
    num_tokens : int
        n.
    num_queries : int or None
        w, None without queries.
    """

    def __init__(self, heads: Heads, num_tokens: int, num_queries: int | None) -> None:
        self.heads, self.length = heads, num_tokens
        self.scale = heads.head_dim**-0.5
        self.measured: dict[str, Launch] = {}
        self.queries = None
        self._dtype = _DTYPES[int(heads.element)]
        if num_queries is not None:
            shape = (num_queries, heads.heads, heads.head_dim)
            self.queries = torch.empty(shape, dtype=self._dtype, device=META).transpose(0, 1)

    @property
    def num_kv_heads(self) -> int:
        """KV."""
        return self.heads.kv_heads

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.length

    @property
    def device(self) -> torch.device:
        """Where nothing is."""
        return META

    @cached_property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """[KV, n, D], gathered from pages at the first reading: that is counted."""
        return self._pages.gather_keys(0, self.length)

    @cached_property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """[KV, n, D], gathered likewise."""
        return self._pages.gather_values(0, self.length)

    @property
    def _pages(self) -> Pages:
        blocks, size = -(-self.length // _BLOCK), self.heads.head_dim
        cache = torch.empty(
            blocks, self.heads.kv_heads, _BLOCK, 2 * size, dtype=self._dtype, device=META
        )
        table = torch.empty(1, blocks, dtype=torch.int32, device=META)
        return Pages(cache[..., :size], cache[..., size:], table, table[0, :1], self.length)

    def attention(self, num_queries: int) -> torch.Tensor:
        """[KV, n]"""
        launch = kernel_bytes.token_scores(self.heads, self.length, num_queries)
        return self._measure(f"attention of {num_queries} queries", launch, self.heads.kv_heads)

    def head_attention(self, num_queries: int) -> torch.Tensor:
        """[H, n]"""
        launch = kernel_bytes.head_scores(self.heads, self.length, num_queries)
        name = f"attention per head of {num_queries} queries"
        return self._measure(name, launch, self.heads.heads)

    def attention_sums(self) -> torch.Tensor:
        """[KV, n]"""
        assert self.queries is not None
        count = self.queries.shape[1]
        launch = kernel_bytes.attention_sums(self.heads, self.length, count)
        return self._measure(f"attention sums of {count} queries", launch, self.heads.kv_heads)

    def window_attention(self, window_size: int) -> torch.Tensor:
        """[KV, windows]; by way of token scores where the kernel does not take the size."""
        assert self.queries is not None
        window = self.queries.shape[1]
        if not kernel_bytes.takes_window_size(window_size):
            return window_means(self.attention(window)[:, : self.length - window], window_size)
        launch = kernel_bytes.window_scores(self.heads, self.length, window, window_size)
        found = self._measure(f"windows of {window_size}", launch, self.heads.kv_heads)
        return found[:, : -(-(self.length - window) // window_size)]

    def key_similarity(self) -> torch.Tensor:
        """[KV, n]"""
        launch = kernel_bytes.key_similarity(self.heads, self.length)
        return self._measure("key similarity", launch, self.heads.kv_heads)

    def key_redundancy(self, threshold: float) -> torch.Tensor:
        """[KV, n]"""
        launch = kernel_bytes.key_redundancy(self.heads, self.length)
        return self._measure(f"redundancy above {threshold:g}", launch, self.heads.kv_heads)

    def lag_contrast(self, num_sinks: int, lag_size: int) -> torch.Tensor:
        """[KV, n]"""
        launch = kernel_bytes.lag_scores(self.heads, self.length)
        name = f"contrast of lags of {lag_size}"
        return self._measure(name, launch, self.heads.kv_heads)

    def _measure(self, name: str, launch: Launch, rows: int) -> torch.Tensor:
        self.measured[name] = launch  # once per batch, however often a policy asks
        return torch.empty(1, rows, self.length, device=META)[0]


_BLOCK = 16  # of the pages that keys are gathered from; any gives the same bytes up to rounding
_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class Probe:
    """A policy and the layer that it is asked about.

    Attributes
    ----------
    policy : Policy
        The policy.
    heads : Heads
        Of one layer on one worker.
    hidden_size, num_ranks : int
        Of the model.
    observation_window, num_sink_tokens : int
        Of the setting.
    chunk_tokens : int
        Of a prompt per step.
    """

    policy: Policy
    heads: Heads
    hidden_size: int
    observation_window: int
    num_sink_tokens: int
    num_ranks: int = 1
    chunk_tokens: int = CHUNK_TOKENS
    _scored: dict[tuple, ScoringCost] = field(default_factory=dict, compare=False)
    _summaries: dict[int, Any] = field(default_factory=dict, compare=False)

    def score(self, num_tokens: int, num_keep: int, decoding: bool = False) -> ScoringCost:
        """Cost of one `score`.

        Parameters
        ----------
        num_tokens, num_keep : int
            Tokens in the cache, and those of them that remain.
        decoding : bool
            Whether generated tokens triggered it.

        Raises
        ------
        ConfigError
            If the policy cannot score tensors without data.
        """
        key = (num_tokens, num_keep, decoding)
        if key not in self._scored:
            self._scored[key] = self._run(lambda: self._score(*key))
        return self._scored[key]

    def fold(self, prompt_len: int) -> list[Launch]:
        """Cost of reading all queries of a prompt chunk by chunk; empty for other policies.

        Raises
        ------
        ConfigError
            If the policy cannot read tensors without data.
        """
        if self.policy.queries is not Queries.PROMPT:
            return []
        return self._run(lambda: self._folded(prompt_len))[1]

    def _run(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # somebody else's code may do anything
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"--speed: the policy {type(self.policy).__name__} cannot be counted, as it does "
                f"not run on tensors without data ({type(error).__name__}: {reason})."
            ) from error

    def _score(self, num_tokens: int, num_keep: int, decoding: bool) -> ScoringCost:
        policy, heads = self.policy, self.heads
        reads = policy.queries is Queries.WINDOW or (policy.queries is Queries.PROMPT and decoding)
        rows = RecordedRows(heads, num_tokens, self.observation_window if reads else None)
        accumulated = None
        if policy.queries is Queries.PROMPT and not decoding:
            accumulated = self._folded(num_tokens)[0]
        projection = None
        if policy.needs_output_projection:
            shape = (heads.heads, self.hidden_size, heads.head_dim)
            projection = torch.empty(shape, dtype=rows._dtype, device=META)
        inputs = ScoreInputs(
            rows=rows,
            accumulated=accumulated,
            position=num_tokens,
            num_keep=num_keep,
            forced=torch.empty(1, num_tokens, dtype=torch.bool, device=META)[0],
            num_sink_tokens=self.num_sink_tokens,
            layer_index=0,
            seed=0,
            output_projection=projection,
            rotary=self._rotary,
            num_ranks=self.num_ranks,
            all_reduce=torch.clone if self.num_ranks > 1 else (lambda tensor: tensor),
        )
        with OperationCounter(META) as counter:
            policy.score(inputs)
        return ScoringCost(rows.measured, counter.launch())

    @property
    def _rotary(self) -> Rotary | None:
        if not self.policy.needs_rotary:
            return None
        return Rotary(torch.empty(self.heads.head_dim // 2, device=META), is_neox=True)

    def _folded(self, prompt_len: int) -> tuple[Any, list[Launch]]:
        """The summary of a prompt, and what it took; found once."""
        if prompt_len not in self._summaries:
            self._summaries[prompt_len] = self._fold(prompt_len)
        return self._summaries[prompt_len]

    def _fold(self, prompt_len: int) -> tuple[Any, list[Launch]]:
        heads, accumulated, counter = self.heads, None, OperationCounter(META)
        measured: list[Launch] = []
        for start in range(0, prompt_len, self.chunk_tokens):
            end = min(start + self.chunk_tokens, prompt_len)
            rows = RecordedRows(heads, end, end - start)
            with counter:
                torch.full((1,), end, dtype=torch.int32, device=META)  # how many the rows are
                chunk = ChunkInputs(
                    rows=rows,
                    start=start,
                    prompt_len=prompt_len,
                    num_sink_tokens=self.num_sink_tokens,
                    rotary=self._rotary,
                )
                accumulated = self.policy.accumulate(accumulated, chunk)
            measured += rows.measured.values()
        return accumulated, [*measured, counter.launch()]
