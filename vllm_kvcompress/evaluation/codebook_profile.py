"""What a codebook does to a model's caches: shared entries, size and error, layer by layer.

A prompt is prefilled with transformers, the worker's own `Compactor` says which tokens survive, and
the worker's own `build_codebook` is run on their keys (before RoPE) and values. Reported are

* how many tokens share an entry where a book may be as large as it likes (the "spindle" of
  SpindleKV, arXiv 2507.06517), and how long the build takes;
* for books of limited size: vectors that had to take an entry they are not similar to, cosines
  lost, and the relative error of what attention in this layer returns to the prompt's last queries,

      |O - O'| / |O|,   O [H, D] over the survivors, O' over what the codebook gives back of them,

  with inputs of the layer that are exact in both cases. Errors of several coded layers meet only in
  `CodedPrompt.compare`, which reads a continuation over all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_kvcompress.config.settings import BudgetConfig, CompressionConfig
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.evaluation.coded_layer import (
    CodedLayer,
    Options,
    Survivors,
    attention_output,
    relative_errors,
)
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch, Rows
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.kernels.codebook.book import Codebook

NUM_QUERIES = 8
CHECK_TOKENS = 32
MOST_TOGETHER = 13
"""Caches that are read in one batch."""
_PLAIN_ROTARY = ("default", "llama3")


@dataclass(frozen=True)
class BookStats:
    """The unlimited books of one layer and kind: all KV heads of one prompt.

    Attributes
    ----------
    entries : list[int]
        Per KV head.
    num_alone : int
        Tokens of all heads whose entry stands for no other token.
    seconds : float
        What the build took.
    """

    entries: list[int]
    num_alone: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Books of one size in one layer, one prompt.

    Attributes
    ----------
    share : float or None
        Entries asked for, as a share of the coded tokens; None: as many as the thresholds ask for.
    num_slots, num_entries : int
        Slots taken, and those of them for entries. `num_entries` 0: no block would come free, so
        nothing is coded and there is no error.
    forced : tuple[float, float]
        Share of the vectors that took the nearest entry instead of a similar one, keys and values.
    mean_loss, max_loss : tuple[float, float]
        1 - cosine to the entry, keys and values.
    errors : list[float]
        Relative error of the layer's output, per query.
    """

    share: float | None
    num_slots: int
    num_entries: int
    forced: tuple[float, float]
    mean_loss: tuple[float, float]
    max_loss: tuple[float, float]
    errors: list[float]


@dataclass(frozen=True)
class LayerProfile:
    """One layer of one prompt after one eviction.

    Attributes
    ----------
    prompt : int
        Number of the prompt, from 0.
    ratio : float
        Budget of the eviction; 1 evicts nothing.
    layer, num_coded : int
        Layer, and c.
    keys, values : BookStats
        Books without limit.
    fits : list[Fit]
        Share None first, then those of the options.
    """

    prompt: int
    ratio: float
    layer: int
    num_coded: int
    keys: BookStats
    values: BookStats
    fits: list[Fit]


def measure_layer(
    layer: CodedLayer, queries: torch.Tensor, query_positions: torch.Tensor, scale: float
) -> tuple[BookStats, BookStats, list[Fit]]:
    """Statistics of both books, and books of all sizes; arguments as of `attention_output`."""
    survivors = layer.survivors
    see = (queries, query_positions)
    exact = attention_output(*see, survivors.keys, survivors.values, survivors.positions, scale)
    fits = []
    for share in (None, *layer.options.shares):
        num_slots, num_entries = layer.slots(share or layer.needed_share)
        if not num_entries:
            nothing, count = (0.0, 0.0), queries.shape[1]
            fits.append(Fit(share, num_slots, 0, nothing, nothing, nothing, [0.0] * count))
            continue
        cut = layer.limited(num_entries)
        losses = [1 - each.cosine for each in cut]
        output = attention_output(*see, *layer.restored(num_entries), survivors.positions, scale)
        fits.append(
            Fit(
                share,
                num_slots,
                num_entries,
                _pair(each.num_forced / each.index.numel() for each in cut),
                _pair(float(loss.mean()) for loss in losses),
                _pair(float(loss.max()) for loss in losses),
                relative_errors(exact, output),
            )
        )
    keys, values = (
        BookStats(book.num_entries.tolist(), _num_alone(book), seconds)
        for book, seconds in zip(layer.books, layer.seconds, strict=True)
    )
    return keys, values, fits


def _pair(numbers: Iterable[float]) -> tuple[float, float]:
    first, second = numbers
    return first, second


def _num_alone(book: Codebook) -> int:
    return sum(int((index.bincount() == 1).sum()) for index in book.index)


# --- whole prompts ------------------------------------------------------------------------


def at_ratio(config: CompressionConfig, ratio: float) -> CompressionConfig | None:
    """A setting that evicts down to `ratio` at the end of any prompt, and codes nothing.

    None for the ratio 1, at which nothing is evicted.

    Raises
    ------
    ConfigError
        If the setting depends on a request's task.
    """
    if config.tasks:
        raise ConfigError(
            "tasks: this setting depends on a request's task, and a profile is of one setting: "
            "leave tasks out, or choose a preset without."
        )
    if ratio == 1:
        return None
    changes = {
        "budget": BudgetConfig(ratio=ratio, floor=1),
        "min_prompt_len": 0,
        "trigger": "end_of_prompt",
        "codebook": None,
    }
    return config.model_copy(update=changes)


def check_rotary(replay: Replay) -> None:
    """Refuse a model whose keys cannot be taken back to before RoPE by angles alone.

    Raises
    ------
    UnsupportedModelError
        Naming the kind of RoPE.
    """
    fields = getattr(replay.text_config, "rope_parameters", None) or {}
    kind = fields.get("rope_type", "default")
    if kind not in _PLAIN_ROTARY:
        raise UnsupportedModelError(
            f"--model: its RoPE is of the type {kind!r}; codebooks take keys before RoPE, which "
            f"is possible for {' and '.join(_PLAIN_ROTARY)}."
        )


@dataclass(frozen=True)
class Comparison:
    """Next tokens over coded layers beside those over the survivors as they are, one prompt.

    Attributes
    ----------
    equal, tokens : int
        Places where the most likely token is the same, of how many.
    divergence : float
        Kullback-Leibler divergence of the next token's distribution, nats, mean over the places.
    """

    equal: int
    tokens: int
    divergence: float


@dataclass(frozen=True)
class Choice:
    """Layers to code, and how large their books are.

    Attributes
    ----------
    layers : tuple of int
        Numbers of the layers.
    share : float
        Entries, as a share of the coded tokens.
    """

    layers: tuple[int, ...]
    share: float


class CodedPrompt:
    """A prompt, and every layer's survivors of an eviction in codebooks.

    Parameters
    ----------
    replay : Replay
        The model, of the options' block size.
    token_ids : sequence of int
        The prompt.
    config : CompressionConfig
        Which tokens survive; see `at_ratio`.
    ratio : float
        Its budget; 1 evicts nothing.
    options : Options
        What to try.

    Raises
    ------
    ConfigError
        If the prompt does not fill a block.
    """

    @torch.inference_mode()
    def __init__(
        self,
        replay: Replay,
        token_ids: Sequence[int],
        config: CompressionConfig,
        ratio: float,
        options: Options,
    ) -> None:
        if len(token_ids) < options.block_size:
            raise ConfigError(
                f"--prompts: a prompt of {len(token_ids)} tokens fills no block; allowed are "
                f"prompts from --block-size ({options.block_size}) up."
            )
        self.replay, self.ratio, self.options = replay, ratio, options
        self.prompt = replay.prefill(token_ids)
        kept = replay.survivors(self.prompt, at_ratio(config, ratio), prompt_seed(token_ids))
        self.layers = [self._coded(layer, positions) for layer, positions in enumerate(kept)]

    def _coded(self, layer: int, positions: torch.Tensor) -> CodedLayer:
        heads = torch.arange(len(positions), device=positions.device)[:, None]
        size, dtype = self.options.block_size, self.options.dtype
        assert self.replay.rotary is not None, "codebooks are refused where nothing turns"
        survivors = Survivors(
            keys=self.prompt.keys[layer][heads, positions].to(dtype),
            values=self.prompt.values[layer][heads, positions].to(dtype),
            positions=positions,
            num_coded=positions.shape[1] // size * size,
            rotary=self.replay.rotary,
        )
        return CodedLayer(survivors, self.options)

    @torch.inference_mode()
    def profile(self, number: int) -> list[LayerProfile]:
        """Measure all layers; `number` is the prompt's, for the results."""
        length = len(self.prompt.token_ids)
        last = torch.arange(length, device=self.replay.device)[-NUM_QUERIES:]
        found = []
        for index, layer in enumerate(self.layers):
            queries = self.prompt.queries[index][:, -NUM_QUERIES:]
            scale = self.replay.layers[index].self_attn.scaling
            results = measure_layer(layer, queries, last, scale)
            num_coded = layer.survivors.num_coded
            found.append(LayerProfile(number, self.ratio, index, num_coded, *results))
        return found

    @torch.inference_mode()
    def compare(
        self, choices: Sequence[Choice], num_tokens: int = CHECK_TOKENS
    ) -> list[Comparison]:
        """What the model says over coded layers, beside what it says over plain survivors.

        The prompt is continued greedily over the survivors, and the continuation is read again over
        each choice; every token but the first, which no codebook has a part in, is compared.

        Parameters
        ----------
        choices : sequence of Choice
            Any order; those of one share after each other take least time.
        num_tokens : int
            Tokens to compare.
        """
        length, device = len(self.prompt.token_ids), self.replay.device
        plain = [self._rows_of(layer, None) for layer in self.layers]
        batch = ReplayBatch(self.replay, [plain], length)
        first = torch.tensor([self.prompt.first_token], device=device)
        said = torch.tensor(batch.decode(first, num_tokens, frozenset()), device=device)
        exact = self._log_probabilities([plain], said)[0]
        best = exact.argmax(-1)
        found = []
        for some in _runs_of_a_share(choices):
            found_of = self._log_probabilities(self._coded_rows(some, plain), said)
            for other in found_of:
                divergence = (exact.exp() * (exact - other)).sum(-1).double().mean()
                equal = int((other.argmax(-1) == best).sum())
                found.append(Comparison(equal, num_tokens, max(float(divergence), 0.0)))
        return found

    def _log_probabilities(self, caches: Sequence[Rows], said: torch.Tensor) -> torch.Tensor:
        """Of the tokens behind each of `said` [1, n]: [caches, n, vocabulary] float32."""
        batch = ReplayBatch(self.replay, caches, len(self.prompt.token_ids))
        logits = batch.extend(said.expand(len(caches), -1))
        return logits.float().log_softmax(-1)

    def _coded_rows(self, choices: Sequence[Choice], plain: Rows) -> list[Rows]:
        """One cache per choice; all of one share."""
        wanted = sorted({layer for choice in choices for layer in choice.layers})
        coded = {}
        for number in wanted:
            layer = self.layers[number]
            num_entries = layer.slots(choices[0].share)[1]
            coded[number] = self._rows_of(layer, num_entries) if num_entries else plain[number]
        return [
            [coded[n] if n in choice.layers else rows for n, rows in enumerate(plain)]
            for choice in choices
        ]

    def _rows_of(
        self, layer: CodedLayer, num_entries: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = layer.survivors.keys, layer.survivors.values
        keys, values = rows if num_entries is None else layer.restored(num_entries)
        dtype = self.replay.model.dtype
        return keys.to(dtype), values.to(dtype)


def _runs_of_a_share(choices: Sequence[Choice]) -> Iterator[list[Choice]]:
    """Neighbours of one share, at most `MOST_TOGETHER`."""
    run: list[Choice] = []
    for choice in choices:
        if run and (choice.share != run[0].share or len(run) == MOST_TOGETHER):
            yield run
            run = []
        run.append(choice)
    if run:
        yield run
