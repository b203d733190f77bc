"""Requests to the server, and the blocks that they hold."""

from typing import Any

import httpx
from prometheus_client.samples import Sample

from lab.demo.metrics import blocks_held, parse_metrics
from lab.errors import RunError

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

ANSWER_TOKENS = 24
"""A chat model says a sentence around the number."""

MEASURE_TOKENS = (32, 128, 512, 2048)
"""Tokens to decode while blocks are read; more where the server outruns the readings."""

MIN_READINGS = 3


class Client:
    """Talks to one server; requests go out one at a time, so the metrics around one are its own.

    Parameters
    ----------
    url : str
        The server's address.
    """

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=120)
        self.model: str = self._checked(self.http.get("/v1/models")).json()["data"][0]["id"]

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            path = response.request.url.path
            raise RunError(f"{path} answered HTTP {response.status_code}: {response.text[:500]}")
        return response

    def tokenize(self, text: str) -> list[int]:
        """Token ids as the server counts them."""
        body = {"model": self.model, "prompt": text}
        return self._checked(self.http.post("/tokenize", json=body)).json()["tokens"]

    def metrics(self) -> list[Sample]:
        """All samples of /metrics."""
        return parse_metrics(self._checked(self.http.get("/metrics")).text)

    def version(self) -> str:
        """Version of vLLM."""
        return self._checked(self.http.get("/version")).json()["version"]

    def body(
        self, endpoint: str, prompt: str | list[int], max_tokens: int, **more: Any
    ) -> dict[str, Any]:
        """JSON of a request."""
        body = {"model": self.model, "temperature": 0, "max_tokens": max_tokens, **more}
        if endpoint == "chat":
            return {**body, "messages": [{"role": "user", "content": prompt}]}
        return {**body, "prompt": prompt}

    def ask(self, endpoint: str, prompt: str | list[int]) -> tuple[str, int]:
        """The model's text, and the prompt's tokens as the server counts them."""
        body = self.body(endpoint, prompt, ANSWER_TOKENS)
        reply = self._checked(self.http.post(ENDPOINTS[endpoint], json=body)).json()
        choice = reply["choices"][0]
        text = choice["message"]["content"] if endpoint == "chat" else choice["text"]
        return text, reply["usage"]["prompt_tokens"]

    def held_per_token(self, body: dict[str, Any], endpoint: str) -> list[int]:
        """Blocks in use on the server at the streamed tokens of a request.

        vLLM sets the gauge after every engine step, so a reading is exact; it may belong to a
        later token than the one just read, and is 0 where the request has ended meanwhile.
        """
        with self.http.stream("POST", ENDPOINTS[endpoint], json=body) as response:
            if response.is_error:
                response.read()
            self._checked(response)
            lines = response.iter_lines()
            readings = [blocks_held(self.metrics()) for line in lines if line.startswith("data: {")]
        return [reading for reading in readings if reading > 0]

    def held(self, endpoint: str, prompt: str | list[int], **more: Any) -> list[int]:
        """Blocks one request holds, read while it decodes; at least `MIN_READINGS` of them."""
        for max_tokens in MEASURE_TOKENS:
            body = self.body(endpoint, prompt, max_tokens, stream=True, ignore_eos=True, **more)
            readings = self.held_per_token(body, endpoint)
            if len(readings) >= MIN_READINGS:
                return readings
        raise RunError("/metrics could not be read often enough while a request was decoded.")
