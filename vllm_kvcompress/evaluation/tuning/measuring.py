"""Losses of one prompt under many settings, by replay: prefilled once, decoded in batches.

agreement  The whole cache's greedy continuation is read again over each compressed cache. The
           loss is the share of its tokens that the compressed cache would not have said. The
           first token is left out: it comes from the prefill, which no setting changes. No
           right answers are needed.
answers    Each cache answers by itself. The loss is what its score lacks of the whole cache's;
           a better score counts as none.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.replay_runner import BATCH_TOKENS, ReplayRunner
from vllm_kvcompress.evaluation.quality.variants import kept_share
from vllm_kvcompress.evaluation.replay import Prefilled
from vllm_kvcompress.evaluation.replay_batch import ReplayBatch
from vllm_kvcompress.evaluation.replay_decoding import is_compacted_behind
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.evaluation.tuning.grid import Candidate
from vllm_kvcompress.evaluation.tuning.losses import Loss
from vllm_kvcompress.evaluation.tuning.preferences import layer_shares
from vllm_kvcompress.evaluation.tuning.prompts_file import OwnPrompt
from vllm_kvcompress.host.part_checks import Turning, keys_turn

AGREEMENT, ANSWERS = "agreement", "answers"
MEASURES = (AGREEMENT, ANSWERS)
_BATCH_LOGITS = 1 << 26  # numbers; 256 MB of them
_END = -1  # stands for every token that ends an answer


class _Setting(NamedTuple):
    """A candidate for this prompt, and the share of bytes it keeps."""

    candidate: Candidate
    config: CompressionConfig
    kept: float


class LossMeter:
    """A model that measures losses.

    Parameters
    ----------
    model : Path
        Folder of a Llama-like model.
    prompter : Prompter
        Of its tokenizer.
    measure : str
        One of `MEASURES`.
    num_tokens : int
        Most tokens of an answer; of a continuation, those that are compared.
    block_size : int
        Tokens per block of the server that is meant.
    device : str
        Of torch.

    Raises
    ------
    ConfigError, UnsupportedModelError
        If the model does not run this way.
    """

    def __init__(
        self,
        model: Path,
        prompter: Prompter,
        measure: str,
        num_tokens: int,
        block_size: int,
        device: str = "cpu",
    ) -> None:
        self.runner = ReplayRunner(model, prompter, block_size, device)
        self.replay, self.prompter = self.runner.replay, prompter
        self.measure, self.num_tokens = measure, num_tokens
        self._classifier: TaskClassifier | None = None

    # --- before anything is measured ------------------------------------------------------

    def check(self, prompts: Iterable[OwnPrompt], candidates: Iterable[Candidate]) -> None:
        """Find out in seconds what would end a run after an hour.

        Raises
        ------
        ConfigError
            If a prompt is longer than the model, or a setting does not fit it.
        """
        for prompt in prompts:
            length = len(self._ids(prompt))
            if length + self.num_tokens > self.runner.longest:
                raise ConfigError(
                    f"{prompt.place}: the prompt has {length} tokens and its answer up to "
                    f"{self.num_tokens}; the model takes {self.runner.longest}."
                )
        turning = keys_turn(SimpleNamespace(hf_text_config=self.replay.text_config))
        for candidate in candidates:
            try:
                is_compacted_behind(candidate.config, self.num_tokens - 1)
            except ConfigError as error:
                raise ConfigError(f"--policies: {candidate.chain}: {error}") from None
            policy = candidate.config.build_policy()
            if turning is Turning.PARTLY and (policy.rerotates_keys or candidate.config.codebook):
                raise ConfigError(
                    f"--policies: {candidate.chain} turns keys by whole positions, alike in all "
                    "layers, and some layers of the model have no rotary embedding; leave it out."
                )
            if turning is Turning.UNKNOWN and (
                policy.needs_rotary or policy.rerotates_keys or candidate.config.codebook
            ):
                raise ConfigError(
                    f"--policies: {candidate.chain} turns keys or queries by whole positions, and "
                    "the model scales its rotary embedding, or what it has turned; leave it out."
                )

    def _ids(self, prompt: OwnPrompt) -> list[int]:
        sample = prompt.sample
        try:
            encoded = self.prompter.encode(sample.context, sample.question, sample.answer_prefix)
        except ConfigError as error:
            raise ConfigError(f"{prompt.place}: {error}") from None
        return encoded.token_ids

    def layer_shares(self, prompts: Iterable[OwnPrompt]) -> list[float]:
        """See `preferences.layer_shares`."""
        return layer_shares(self.replay, [self._ids(prompt) for prompt in prompts])

    # --- one prompt -----------------------------------------------------------------------

    def losses(self, prompt: OwnPrompt, candidates: Sequence[Candidate]) -> list[Loss]:
        """One per candidate, in any order."""
        token_ids = self._ids(prompt)
        settings = self._settings(token_ids, candidates)
        # What frees nothing is the whole cache, whose loss is 0; if all are, nothing has to run.
        found = [
            self._loss(prompt, token_ids, each, 0.0, 0.0) for each in settings if each.kept == 1
        ]
        compressed = [each for each in settings if each.kept < 1]
        if not compressed:
            return found
        prefilled = self.replay.prefill(token_ids)
        how = self._agreement if self.measure == AGREEMENT else self._answers
        for setting, loss, seconds in how(prompt, prefilled, compressed):
            found.append(self._loss(prompt, token_ids, setting, loss, seconds))
        return found

    def _settings(self, token_ids: list[int], candidates: Sequence[Candidate]) -> list[_Setting]:
        task = self._task(token_ids, candidates)
        sizes = len(token_ids), len(self.replay.full_layers), self.replay.block_size
        codes = self.runner.codes_per_row
        return [
            _Setting(each, each.setting(task), kept_share(each.setting(task), *sizes, codes))
            for each in candidates
        ]

    def _task(self, token_ids: list[int], candidates: Sequence[Candidate]) -> str | None:
        """What the server's classifier says of a prompt, if a setting wants to know."""
        if not any(each.depends_on_task for each in candidates):
            return None
        if self._classifier is None:
            self._classifier = TaskClassifier.load()
        head, tail = head_and_tail(token_ids)
        decode = self.prompter.tokenizer.decode
        return self._classifier.classify(decode(head), decode(tail))

    @staticmethod
    def _loss(
        prompt: OwnPrompt, token_ids: list[int], setting: _Setting, loss: float, seconds: float
    ) -> Loss:
        return Loss(
            prompt=prompt.digest,
            setting=setting.candidate.digest,
            name=setting.candidate.name,
            loss=loss,
            kept=round(setting.kept, 6),
            prompt_tokens=len(token_ids),
            seconds=round(seconds, 4),
        )

    # --- the two measures -----------------------------------------------------------------

    def _agreement(
        self, prompt: OwnPrompt, prefilled: Prefilled, settings: Sequence[_Setting]
    ) -> Iterator[tuple[_Setting, float, float]]:
        said = self._answer(prefilled, [None], self.num_tokens + 1)[0]
        read = said[: self.num_tokens]
        if not read:  # the whole cache ends at once, by the prefill's token
            yield from ((each, 0.0, 0.0) for each in settings)
            return
        ended = [_END] * (len(said) <= self.num_tokens)
        expected = torch.tensor(said[1:] + ended, device=self.replay.device)
        ends = torch.tensor(sorted(self.runner.stop), device=self.replay.device)
        for batch in self._batches(settings, len(prefilled.token_ids), len(read)):
            start = time.perf_counter()
            given = torch.tensor(read, device=self.replay.device).expand(len(batch), -1)
            best = self._batch(prefilled, [each.config for each in batch]).extend(given).argmax(-1)
            best = torch.where(torch.isin(best, ends), _END, best)
            losses = (best != expected).double().mean(dim=1).tolist()
            seconds = (time.perf_counter() - start) / len(batch)
            for setting, loss in zip(batch, losses, strict=True):
                yield setting, loss, seconds

    def _answers(
        self, prompt: OwnPrompt, prefilled: Prefilled, settings: Sequence[_Setting]
    ) -> Iterator[tuple[_Setting, float, float]]:
        def score(tokens: list[int]) -> float:
            return METRICS[prompt.sample.metric](self.prompter.text(tokens), prompt.sample)

        whole = score(self._answer(prefilled, [None], self.num_tokens)[0])
        for batch in self._batches(settings, len(prefilled.token_ids), 1):
            start = time.perf_counter()
            answers = self._answer(prefilled, [each.config for each in batch], self.num_tokens)
            seconds = (time.perf_counter() - start) / len(batch)
            for setting, tokens in zip(batch, answers, strict=True):
                yield setting, max(0.0, whole - score(tokens)), seconds

    def _batch(
        self, prefilled: Prefilled, configs: Sequence[CompressionConfig | None]
    ) -> ReplayBatch:
        seed = prompt_seed(prefilled.token_ids)
        caches = [self.replay.rows(prefilled, config, seed)[0] for config in configs]
        return ReplayBatch(self.replay, caches, len(prefilled.token_ids))

    def _answer(
        self,
        prefilled: Prefilled,
        configs: Sequence[CompressionConfig | None],
        max_tokens: int,
    ) -> list[list[int]]:
        """Greedy tokens over each cache, without the one that ends the answer."""
        batch = self._batch(prefilled, configs)
        first = torch.full((batch.size,), prefilled.first_token, device=self.replay.device)
        return batch.decode(first, max_tokens, self.runner.stop)

    def _batches(
        self, settings: Sequence[_Setting], length: int, num_read: int
    ) -> Iterator[list[_Setting]]:
        """Settings that keep about equally much together, so that little is padding."""
        most = max(1, _BATCH_LOGITS // (num_read * self.replay.text_config.vocab_size))
        batch: list[_Setting] = []
        for setting in sorted(settings, key=lambda each: each.kept):
            cached = setting.kept * length * (len(batch) + 1)
            if batch and (cached > BATCH_TOKENS or len(batch) == most):
                yield batch
                batch = []
            batch.append(setting)
        if batch:
            yield batch
