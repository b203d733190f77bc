"""Asks with OpenAI's package, and goes away when the request says so."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import APIConnectionError, APIError, APIStatusError, AsyncOpenAI

from lab.soak.questions import Question, Request

PATIENCE = 600.0
"""Seconds after which a client takes it that the server hangs."""
NOT_OPENAI = (
    "ignore_eos", "return_token_ids", "vllm_xargs", "priority", "stop_token_ids", "cache_salt",
)  # fmt: skip


@dataclass
class Answer:
    """What came of a request.

    Attributes
    ----------
    outcome : str
        "finished"; "left" by the client; "refused" (HTTP 400); "error" of another kind; "cut" (the
        connection ended early); or "hung".
    tokens : list[list[int]]
        Token ids, by choice.
    reasons : list[str or None]
        finish_reason, by choice.
    num_counted : int or None
        completion_tokens of the server's usage.
    num_cached : int or None
        Prompt tokens that the server did not compute.
    error : str
        What the client was told.
    seconds : float
        From the request to its end.
    """

    outcome: str = "finished"
    tokens: list[list[int]] = field(default_factory=list)
    reasons: list[str | None] = field(default_factory=list)
    num_counted: int | None = None
    error: str = ""
    seconds: float = 0.0

    def add(self, choices: Sequence[Any]) -> None:
        """Take the choices of an answer, or of an event of a stream."""
        for choice in choices:
            while len(self.tokens) <= choice.index:
                self.tokens.append([])
                self.reasons.append(None)
            self.tokens[choice.index] += getattr(choice, "token_ids", None) or []
            self.reasons[choice.index] = choice.finish_reason or self.reasons[choice.index]


class Client:
    """A client of one server, for use inside of one event loop.

    Parameters
    ----------
    url : str
        Of the server, without /v1.
    model : str
        The name it serves the model under.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.http = httpx.AsyncClient(timeout=60)
        self.openai = AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
        )

    async def close(self) -> None:
        """Close all connections."""
        await self.openai.close()
        await self.http.aclose()

    async def ask(self, question: Question, request: Request, stop: Sequence[int] = ()) -> Answer:
        """Send a request and wait for what comes of it.

        Parameters
        ----------
        question, request
            What is asked, and how.
        stop : sequence of int
            Stop tokens.
        """
        body = question.body(self.model, request.max_tokens)
        body |= {"priority": request.priority, "stop_token_ids": list(stop)}
        extra = dict(request.extra)
        body["vllm_xargs"] = body["vllm_xargs"] | extra.pop("vllm_xargs", {})
        return await self.send(body | extra, question.is_chat, request)

    async def send(self, body: dict[str, Any], is_chat: bool, request: Request) -> Answer:
        """Send these fields."""
        openai = {key: value for key, value in body.items() if key not in NOT_OPENAI}
        openai["extra_body"] = {key: body[key] for key in NOT_OPENAI if key in body}
        api = self.openai.chat.completions if is_chat else self.openai.completions
        answer, start = Answer(), time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                if request.stream:
                    await self._stream(api, openai, request, answer)
                else:
                    await self._whole(api, openai, request, answer)
        except TimeoutError:
            answer.outcome = "hung"
        except APIConnectionError as error:
            answer.outcome, answer.error = "cut", f"{type(error).__name__}: {error.__cause__!r}"
        except APIStatusError as error:
            answer.outcome = "refused" if error.status_code == 400 else "error"
            answer.error = f"HTTP {error.status_code}: {error.message}"
        except APIError as error:  # an event of a stream
            body_of = error.body if isinstance(error.body, dict) else {}
            answer.outcome = "refused" if body_of.get("code") == 400 else "error"
            answer.error = f"{type(error).__name__}: {error.message}"
        except Exception as error:
            # Of the library below, httpx or httpx2: in the middle of a stream nobody wraps them.
            if not type(error).__module__.startswith("httpx"):
                raise
            answer.outcome, answer.error = "cut", f"{type(error).__name__}: {error}"
        answer.seconds = time.monotonic() - start
        return answer

    async def _whole(
        self, api: Any, body: dict[str, Any], request: Request, answer: Answer
    ) -> None:
        patience = request.leave_after if request.fate == "cancel" else None
        try:
            async with asyncio.timeout(patience):
                found = await api.create(**body)
        except TimeoutError:
            if patience is None:
                raise
            answer.outcome = "left"
            return
        answer.add(found.choices)
        answer.num_counted = found.usage.completion_tokens

    async def _stream(
        self, api: Any, body: dict[str, Any], request: Request, answer: Answer
    ) -> None:
        leaves = request.fate == "disconnect"
        body["stream_options"] = {"include_usage": True}
        async with await api.create(**body, stream=True) as events:
            async for event in events:
                answer.add(event.choices)
                if event.usage is not None:
                    answer.num_counted = event.usage.completion_tokens
                if leaves and sum(map(len, answer.tokens)) >= request.leave_after:
                    answer.outcome = "left"
                    return
        if not all(answer.reasons) or not answer.reasons:
            answer.outcome, answer.error = "cut", "the stream ended without a finish_reason"

    # --- the server itself ----------------------------------------------------------------

    async def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry the labels."""
        return total(await self.metrics(), name, **labels)

    async def metrics(self) -> str:
        """What /metrics says."""
        return (await self.http.get(f"{self.url}/metrics")).text

    async def reset(self, running: bool = False) -> bool:
        """Empty the prefix cache; running requests start again, or forbid it."""
        query = {"reset_running_requests": str(running).lower()}
        reply = await self.http.post(f"{self.url}/reset_prefix_cache", params=query)
        return reply.status_code == 200 and bool(reply.json()["success"])

    async def idle(self, patience: float = PATIENCE) -> bool:
        """Wait until the server has no requests; False where it still has some."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            text = await self.metrics()
            if not total(text, "vllm:num_requests_running") + total(
                text, "vllm:num_requests_waiting"
            ):
                return True
            await asyncio.sleep(0.5)
        return False


def total(text: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples in a Prometheus text that carry the labels; 0 without any."""
    found = 0.0
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.split("{")[0] == name and all(
            f'{key}="{each}"' in head for key, each in labels.items()
        ):
            found += float(value)
    return found


def by_label(text: str, name: str, label: str) -> dict[str, float]:
    """A metric's samples by the values of one label, those above 0."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.split("{")[0] == name and f'{label}="' in head and float(value):
            key = head.split(f'{label}="')[1].split('"')[0]
            found[key] = found.get(key, 0) + float(value)
    return found
