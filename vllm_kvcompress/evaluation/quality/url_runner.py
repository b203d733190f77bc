"""Samples answered by a running server: any that speaks OpenAI's completions API."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.metrics import METRICS
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.records import Record
from vllm_kvcompress.evaluation.quality.run import Stopped
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.variants import Variant

SERVER = "server"
"""The policy that leaves a request as the server was started."""
UNCOMPRESSED = "vllm:kv_compression_uncompressed_requests"
ATTEMPTS, PAUSE_S, TIMEOUT_S = 4, 2.0, 600.0


class UrlRunner:
    """A server somewhere; prompts are sent as token ids of the local tokenizer.

    Parameters
    ----------
    url : str
        Such as ``http://localhost:8000``, with or without ``/v1``.
    prompter : Prompter
        Of the served model's tokenizer.
    num_parallel : int
        Requests at once.

    Raises
    ------
    ConfigError
        If nobody answers there.
    """

    def __init__(self, url: str, prompter: Prompter, num_parallel: int) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.prompter, self.num_parallel = prompter, num_parallel
        self.client = httpx.Client(timeout=TIMEOUT_S)
        try:
            models = self.client.get(f"{self.url}/v1/models").raise_for_status().json()["data"]
            self.model = models[0]["id"]
            self.longest = models[0].get("max_model_len")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                f"--url: {url} names no model at /v1/models ({_line(error)}); allowed is the "
                "address of a server with OpenAI's API."
            ) from None
        self._before = self._uncompressed()

    def uncompressed(self) -> dict[str, int]:
        """Requests that the server served uncompressed since, by reason; those of others count."""
        found = self._uncompressed()
        return {reason: count for reason, count in (found - self._before).items() if count}

    def _uncompressed(self) -> Counter[str]:
        """Its counter, but for requests that asked for no compression; empty at other servers."""
        try:
            text = self.client.get(f"{self.url}/metrics").raise_for_status().text
            lines = [line for line in text.splitlines() if UNCOMPRESSED in line]
            families = list(text_string_to_metric_families("\n".join(lines) + "\n"))
        except (httpx.HTTPError, ValueError):
            return Counter()
        found: Counter[str] = Counter()
        for each in (sample for family in families for sample in family.samples):
            if each.name == f"{UNCOMPRESSED}_total" and each.labels["reason"] != "opted_out":
                found[each.labels["reason"]] += int(each.value)
        return found

    def measure(
        self, sample: Sample, protocol: str, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Records of one sample, one per variant.

        Raises
        ------
        ConfigError
            If the server refuses the request, or the task needs more than answers.
        Stopped
            If the server is gone.
        """
        if protocol != "visible":
            raise ConfigError("--protocol: a server compresses whole prompts; allowed is visible.")
        if sample.metric not in METRICS:
            raise ConfigError(f"--tasks: {sample.task} needs logits, which a server does not give.")
        prompt = self.prompter.of(sample, self.longest).token_ids
        with ThreadPoolExecutor(self.num_parallel) as pool:
            yield from pool.map(lambda each: self._record(sample, prompt, each), variants)

    def _record(self, sample: Sample, prompt: list[int], variant: Variant) -> Record:
        start = time.perf_counter()
        found = self._ask(prompt, sample.max_tokens, variant)
        answer = found["choices"][0]["text"]
        return Record(
            task=sample.task,
            sample=sample.name,
            length=sample.length,
            depth=sample.depth,
            protocol="visible",
            policy=variant.label,
            budget=variant.budget,
            kept=1.0 if variant.is_baseline else None,
            prompt_tokens=len(prompt),
            answer=answer,
            answer_tokens=int(found.get("usage", {}).get("completion_tokens", 0)),
            score=METRICS[sample.metric](answer, sample),
            seconds=round(time.perf_counter() - start, 4),
        )

    def _ask(self, prompt: list[int], max_tokens: int, variant: Variant) -> Any:
        body: dict[str, Any] = {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0
        }  # fmt: skip
        if variant.policy != SERVER:
            body["vllm_xargs"] = {"kv_compression": variant.policy}
            if not variant.is_baseline:
                body["vllm_xargs"]["kv_budget_ratio"] = variant.budget
            # Settings of one prompt would share its blocks, and blocks that others hold are not
            # worth a compaction: answers would be the whole cache's.
            body["cache_salt"] = f"kvcompress eval {variant.label} {variant.budget:g}"
        for attempt in range(ATTEMPTS):
            try:
                response = self.client.post(f"{self.url}/v1/completions", json=body)
                if response.status_code < 500:
                    return self._checked(response)
                why = f"HTTP {response.status_code}"
            except httpx.HTTPError as error:
                why = _line(error)
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE_S * 2**attempt)
        raise Stopped(f"--url: {self.url} does not answer any more ({why}).")

    def _checked(self, response: httpx.Response) -> Any:
        try:
            found = response.json()
            if response.is_success and isinstance(found["choices"][0]["text"], str):
                return found
            message = found.get("error", found)
            message = message.get("message", message) if isinstance(message, dict) else message
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            message = response.text
        raise ConfigError(
            f"--url: {self.url} answered HTTP {response.status_code}: {str(message)[:200]}."
        )


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
