"""Samples answered by transformers over caches that the worker's own code has compressed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.inspection import load_replay
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.prompts import Prompt, Prompter
from vllm_kvcompress.evaluation.quality.records import Record
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant, kept_share
from vllm_kvcompress.evaluation.replay import Prefilled
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch, Rows
from vllm_kvcompress.evaluation.replay_decoding import Decoding, is_compacted_behind
from vllm_kvcompress.kernels.codebook.format import codes_per_row

BATCH_TOKENS = 16_384
"""Cached tokens that are decoded together: more take memory and save nothing."""

CONTINUATION = "continuation"


@dataclass(frozen=True)
class _Asked:
    """A sample on its way through the settings."""

    sample: Sample
    protocol: str
    prompt: Prompt
    prefilled: Prefilled
    task: str | None

    @property
    def length(self) -> int:
        """Tokens that are compressed."""
        return len(self.prefilled.token_ids)

    def setting(self, variant: Variant) -> CompressionConfig | None:
        """A variant's setting for this prompt; None where the server would leave it alone."""
        setting = variant.setting(self.task)
        if setting is None or setting.compacts_at_intervals:
            return setting  # which counts a short prompt's generated tokens
        return None if self.length < setting.min_prompt_len else setting


@dataclass(frozen=True)
class _Result:
    """What one setting gave."""

    answer: str
    num_tokens: int
    score: float
    seconds: float
    nll: float | None = None
    kl: float | None = None
    kept: float | None = None


class ReplayRunner:
    """A model on transformers; prompts are prefilled once for all settings.

    Parameters
    ----------
    model : Path
        Folder of a Llama-like model.
    prompter : Prompter
        Of its tokenizer.
    block_size : int
        Tokens per block of the server that is meant.
    device : str
        Of torch.

    Raises
    ------
    ConfigError, UnsupportedModelError
        If the model does not run this way; behind a server (``--url``) any does.
    """

    def __init__(self, model: Path, prompter: Prompter, block_size: int, device: str) -> None:
        self.prompter = prompter
        self.replay = load_replay(model, block_size, device=device)
        self.longest = self.replay.longest
        head_size = self.replay.layers[self.replay.full_layers[0]].self_attn.head_dim
        self.codes_per_row = codes_per_row(head_size * self.replay.model.dtype.itemsize)
        ends: Any = self.replay.model.generation_config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), prompter.tokenizer.eos_token_id]
        self.stop = frozenset(token for token in ends if token is not None)
        self._classifier: TaskClassifier | None = None

    def uncompressed(self) -> dict[str, int]:
        """None: here no pool is full; what a setting leaves whole, its records' `kept` says."""
        return {}

    def measure(
        self, sample: Sample, protocol: str, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Records of one sample, one per variant.

        Raises
        ------
        ConfigError
            If the prompt is longer than the model, or more than memory holds; or, once the others
            are measured, if there are settings that this sample cannot measure.
        """
        prompt = self.prompter.of(sample, self.longest)
        try:
            yield from self._measure(sample, protocol, variants, prompt)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise ConfigError(
                f"the prompt of {len(prompt.token_ids)} tokens does not fit into the memory of "
                f"{self.replay.device}: choose shorter prompts, a smaller model or another "
                "--device."
            ) from None

    def _measure(
        self, sample: Sample, protocol: str, variants: Sequence[Variant], prompt: Prompt
    ) -> Iterator[Record]:
        compressed = prompt.token_ids if protocol == "visible" else prompt.context
        task = self._task(compressed, variants)
        asked = _Asked(sample, protocol, prompt, self.replay.prefill(compressed), task)
        tokens, results = self.prompter.continuation(sample.continuation), self._continue
        num_following = len(tokens) - 1
        if sample.metric != CONTINUATION:
            results, num_following = self._answer, sample.max_tokens - 1
            num_following += len(prompt.rest) if protocol == "hidden" else 0
        told: dict[Variant, bool] = {}
        refused: list[str] = []
        for variant in variants:
            try:
                told[variant] = _is_compacted_behind(asked.setting(variant), num_following)
            except ConfigError as error:
                refused.append(f"{variant.label}: {error}")
        for variant, result in results(asked, told):
            yield self._record(asked, variant, result)
        if refused:
            raise ConfigError(" ".join(dict.fromkeys(refused)))

    def _task(self, token_ids: list[int], variants: Sequence[Variant]) -> str | None:
        """What the server's classifier says of a prompt, if a setting wants to know."""
        if not any(variant.depends_on_task for variant in variants):
            return None
        if self._classifier is None:
            self._classifier = TaskClassifier.load()
        head, tail = head_and_tail(token_ids)
        decode = self.prompter.tokenizer.decode
        return self._classifier.classify(decode(head), decode(tail))

    # --- answers --------------------------------------------------------------------------

    def _answer(
        self, asked: _Asked, variants: Mapping[Variant, bool]
    ) -> Iterator[tuple[Variant, _Result]]:
        """Those marked True are compacted again on the way, and so each is decoded alone."""
        metric = METRICS[asked.sample.metric]
        for variant in (each for each, is_again in variants.items() if is_again):
            start = time.perf_counter()
            setting = asked.setting(variant)
            assert setting is not None
            request = Decoding(self.replay, asked.prefilled, setting)
            first = request.prompt.first_token
            if asked.protocol == "hidden":
                first = int(request.extend(asked.prompt.rest)[-1].argmax())
            tokens = request.greedy(first, asked.sample.max_tokens, self.stop)
            seconds, answer = time.perf_counter() - start, self.prompter.text(tokens)
            score = metric(answer, asked.sample)
            kept = request.mean_kept
            yield variant, _Result(answer, len(tokens), score, seconds, kept=kept)
        alike = [each for each, is_again in variants.items() if not is_again]
        for batch in _batches(alike, asked.length):
            start = time.perf_counter()
            settings = [asked.setting(variant) for variant in batch]
            prompts = [self.replay.under(asked.prefilled, setting) for setting in settings]
            caches = [
                self.replay.rows(prompt, setting)[0]
                for prompt, setting in zip(prompts, settings, strict=True)
            ]
            found = self._decode(asked, caches, [prompt.first_token for prompt in prompts])
            seconds = (time.perf_counter() - start) / len(batch)
            for variant, tokens in zip(batch, found, strict=True):
                answer = self.prompter.text(tokens)
                score = metric(answer, asked.sample)
                yield variant, _Result(answer, len(tokens), score, seconds)

    def _decode(
        self, asked: _Asked, caches: Sequence[Rows], first_tokens: list[int]
    ) -> list[list[int]]:
        batch = ReplayBatch(self.replay, caches, asked.length)
        if asked.protocol == "visible":
            first = torch.tensor(first_tokens, device=self.replay.device)
        else:
            rest = torch.tensor([asked.prompt.rest], device=self.replay.device)
            first = batch.extend(rest.expand(batch.size, -1))[:, -1].argmax(-1)
        return batch.decode(first, asked.sample.max_tokens, self.stop)

    # --- continuations --------------------------------------------------------------------

    def _continue(
        self, asked: _Asked, variants: Mapping[Variant, bool]
    ) -> Iterator[tuple[Variant, _Result]]:
        """How each cache predicts the text that follows, token by token, beside the whole one.

        The first token is left out: it comes from the prefill, which a compaction at the prompt's
        end does not change.
        """
        tokens = self.prompter.continuation(asked.sample.continuation)
        whole, _ = self._log_probabilities(asked, None, False, tokens)
        best, truth = whole.argmax(-1), torch.tensor(tokens[1:], device=whole.device)
        for variant, is_again in variants.items():
            start = time.perf_counter()
            found, kept = self._log_probabilities(asked, asked.setting(variant), is_again, tokens)
            agreement = float((found.argmax(-1) == best).double().mean())
            nll = float(-found.gather(1, truth[:, None]).double().mean())
            kl = float((whole.exp() * (whole - found)).sum(-1).double().mean())
            seconds = time.perf_counter() - start
            yield variant, _Result("", len(truth), agreement, seconds, nll, max(kl, 0.0), kept)

    def _log_probabilities(
        self, asked: _Asked, setting: CompressionConfig | None, is_again: bool, tokens: list[int]
    ) -> tuple[torch.Tensor, float | None]:
        """Of the tokens behind each of `tokens` but the last: [n - 1, vocabulary] float32.

        And, where the cache is compacted again meanwhile, the share of it that was held.
        """
        if is_again:
            assert setting is not None
            request = Decoding(self.replay, asked.prefilled, setting)
            logits = request.extend(tokens[:-1])
            return logits.float().log_softmax(-1), request.mean_kept
        rows = self.replay.rows(asked.prefilled, setting)[0]
        batch = ReplayBatch(self.replay, [rows], asked.length)
        given = torch.tensor([tokens[:-1]], device=self.replay.device)
        return batch.extend(given)[0].float().log_softmax(-1), None

    # --- records --------------------------------------------------------------------------

    def _record(self, asked: _Asked, variant: Variant, result: _Result) -> Record:
        # Of layers that attend to everything; what others hold no setting changes.
        num_layers = len(self.replay.full_layers)
        kept = result.kept
        if kept is None:
            sizes = asked.length, num_layers, self.replay.block_size, self.codes_per_row
            kept = kept_share(asked.setting(variant), *sizes)
        return Record(
            task=asked.sample.task,
            sample=asked.sample.name,
            length=asked.sample.length,
            depth=asked.sample.depth,
            protocol=asked.protocol,
            policy=variant.label,
            budget=variant.budget,
            kept=round(kept, 5),
            prompt_tokens=len(asked.prompt.token_ids),
            answer=result.answer,
            answer_tokens=result.num_tokens,
            score=result.score,
            seconds=round(result.seconds, 4),
            nll=result.nll,
            kl=result.kl,
        )


def _is_compacted_behind(setting: CompressionConfig | None, num_tokens: int) -> bool:
    """As `is_compacted_behind`; ConfigError, too, where a setting would compress nothing at all."""
    found = is_compacted_behind(setting, num_tokens)
    if setting is not None and not setting.compresses_prompts and not found:
        raise ConfigError(
            f"it compresses only while decoding, every {setting.interval} tokens, and {num_tokens} "
            "tokens follow: predict more of a text (--continuation)."
        )
    return found


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory of a GPU or, by torch's words for it, of the host has run out."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "DefaultCPUAllocator" in str(error)


def _batches(variants: Sequence[Variant], length: int) -> Iterator[list[Variant]]:
    """Variants of about equal budget together, so that little is padding."""
    batch: list[Variant] = []
    for variant in sorted(variants, key=lambda each: each.budget):
        if batch and variant.budget * length * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(variant)
    if batch:
        yield batch
