"""Samples answered by vLLM itself, in this process: one engine per policy."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.records import Record
from vllm_kvcompress.evaluation.quality.run import Stopped
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import BASELINE, Variant


class EngineRunner:
    """An engine at a time; asked for another policy, it closes one and starts the next.

    Parameters
    ----------
    model : Path
        Folder of the model.
    prompter : Prompter
        Of its tokenizer.
    **engine_args
        For `Engine`, such as ``max_model_len`` and ``block_size``; not what it sets for tests.
    """

    def __init__(self, model: Path, prompter: Prompter, **engine_args: Any) -> None:
        self.model, self.prompter, self.engine_args = model, prompter, engine_args
        self.policy: str | None = None
        self.engine: Engine | None = None
        self._uncompressed: Counter[str] = Counter()

    def uncompressed(self) -> dict[str, int]:
        """Requests that were served uncompressed though a policy was asked for, by reason."""
        self._count()
        return dict(self._uncompressed)

    def _count(self) -> None:
        if self.engine is not None and self.policy != BASELINE:
            found = self.engine.scheduler.stats.uncompressed
            self._uncompressed.update({r: n for r, n in found.items() if n})
            found.clear()

    def _engine_of(self, variant: Variant) -> Engine:
        if self.engine is None or self.policy != variant.policy:
            self.close()
            setting = None if variant.config is None else variant.config.to_dict()
            try:
                self.engine = Engine(str(self.model), setting, **self.engine_args)
            except (ConfigError, ValueError, OSError) as error:
                line = str(error).strip().partition("\n")[0].rstrip(".")
                raise Stopped(f"--model: vLLM does not start with it: {line}.") from None
            self.policy = variant.policy
        return self.engine

    def close(self) -> None:
        """Shut down what runs."""
        self._count()
        if self.engine is not None:
            self.engine.close()
        self.engine = self.policy = None

    def measure(
        self, sample: Sample, protocol: str, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Records of one sample.

        Variants run one after the other: at once they would share the prompt's blocks, and blocks
        that others hold are not worth a compaction.

        Raises
        ------
        ConfigError
            If the engine refuses the request, or the task needs more than answers.
        Stopped
            If vLLM does not start.
        """
        if protocol != "visible":
            raise ConfigError("--protocol: vLLM compresses whole prompts; allowed is visible.")
        if sample.metric not in METRICS:
            raise ConfigError(f"--tasks: {sample.task} needs logits; measure it by replay.")
        for policy in dict.fromkeys(each.policy for each in variants):
            group = [each for each in variants if each.policy == policy]
            engine = self._engine_of(group[0])
            longest = engine.llm.model_config.max_model_len
            prompt = self.prompter.of(sample, longest).token_ids
            from vllm.exceptions import VLLMError

            for variant in group:
                xargs = None if variant.is_baseline else {"kv_budget_ratio": variant.budget}
                start = time.perf_counter()
                try:
                    [tokens] = engine.generate([prompt], sample.max_tokens, xargs)
                except (ValueError, VLLMError) as error:
                    raise ConfigError(str(error).strip().partition("\n")[0]) from None
                seconds = time.perf_counter() - start
                answer = self.prompter.text(tokens)
                yield Record(
                    task=sample.task,
                    sample=sample.name,
                    length=sample.length,
                    depth=sample.depth,
                    protocol=protocol,
                    policy=variant.label,
                    budget=variant.budget,
                    kept=1.0 if variant.is_baseline else None,
                    prompt_tokens=len(prompt),
                    answer=answer,
                    answer_tokens=len(tokens),
                    score=METRICS[sample.metric](answer, sample),
                    seconds=round(seconds, 4),
                )
