"""Sends a server what schemathesis and Hypothesis make up; what only ours gets wrong is a finding.

    pip install schemathesis
    python scripts/bad_input.py --count 60

A server of the probe model with ``--kv-compression`` gets everything. It must answer each request
with a status below 500, in little; between them a request that is well formed must get the tokens
that it got at first. Then a server without the plugin gets whatever was answered otherwise: what it
answers alike is vLLM's own and is listed as such. A report is printed and written as JSON.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import track

from lab.bad_input.document import Sent, drawn, narrowed, requests_of
from lab.bad_input.values import RIGHT, VALUES, in_json
from lab.errors import RunError
from lab.places import PROBE_MODEL, SCRIPTS
from lab.servers import free_port, progress, running_server, stock_plugins, wait_until_ready

MODEL = "probe"
OPTIONS = [
    *["--served-model-name", MODEL, "--host", "127.0.0.1", "--max-model-len", "2048"],
    *["--kv-cache-memory-bytes", "33554432", "--max-num-seqs", "4", "--enforce-eager"],
    # No request generates more, whatever it asks for.
    *["--override-generation-config", '{"max_new_tokens": 6}'],
]
START_LIMIT = 900
"""Seconds. A server that starts alone needs far less; beside other work, many times that."""
OURS = ["--kv-compression", "windowkv", "--kv-compression-config.sessions.max_blocks_ratio=0.5"]
PROMPT = "The quick brown fox jumps over the lazy dog. " * 60
EVERY = 25
"""Requests between two looks at whether the server is as it was."""
MAX_ANSWER = 20_000
"""Bytes of a refusal: what was sent is not echoed whole."""
PATIENCE = 120
INTERNAL = "an internal error in a stream"


@dataclass
class Finding:
    """An answer that should not be.

    Attributes
    ----------
    label : str
        Where the request came from.
    what : str
        What is wrong, the same for alike ones.
    body : str
        The beginning of what was sent.
    answer : str
        The beginning of what came back.
    alone : bool
        Whether a server without the plugin does not answer so.
    stock : str
        The beginning of what that server answered.
    """

    label: str
    what: str
    body: str
    answer: str
    alone: bool = True
    stock: str = ""


@dataclass
class Report:
    """What was sent and what came back."""

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    checks: int = 0
    findings: list[Finding] = field(default_factory=list)

    def write(self, path: Path, seconds: float) -> None:
        """As JSON."""
        fields = {
            "sent": dict(self.sent),
            "statuses": dict(self.statuses),
            "checks": self.checks,
            "findings": [asdict(each) for each in self.findings],
            "seconds": round(seconds),
        }
        path.write_text(json.dumps(fields, indent=1), encoding="utf-8")


def values_of_options(count: int, number: int) -> Iterable[Sent]:
    """`count` completions for each of our options, with anything for its value."""
    made = []
    prompts = st.sampled_from(["One, two", PROMPT])
    for key, right in RIGHT.items():
        for value, prompt in drawn(st.tuples(right | VALUES, prompts), count, number):
            if not in_json(value):
                continue
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "vllm_xargs": {key: value}}
            headers = {"content-type": "application/json"}
            request = {"method": "POST", "url": "/v1/completions", "headers": headers}
            made.append(Sent(f"value of {key}", {**request, "content": json.dumps(body).encode()}))
    return made


def known_faults() -> list[Sent]:
    """What vLLM itself gets wrong by what we say of it, so that both servers are asked."""
    half, messages = "\ud800", [{"role": "user", "content": "x"}]
    completion = {"model": MODEL, "prompt": "One, two", "max_tokens": 2}
    chat = {"model": MODEL, "messages": messages, "max_tokens": 2}
    bodies = [
        ("half a character in a value", "completions", completion, {"other": half}),
        ("half a character in a name", "completions", completion, {half: 1}),
        ("half a character in a value, chat", "chat/completions", chat, {"other": half}),
        ("refused in a stream", "messages", chat | {"stream": True}, {"kv_budget": -1}),
    ]
    return [
        Sent(
            f"known: {label}",
            {
                "method": "POST",
                "url": f"/v1/{path}",
                "headers": {"content-type": "application/json"},
                "content": json.dumps({**body, "vllm_xargs": options}).encode(),
            },
        )
        for label, path, body, options in bodies
    ]


def wrong(response: httpx.Response) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if response.status_code >= 500:
        return f"status {response.status_code}: {_kind(response.text)}"
    # A stream has begun with 200 before vLLM looks at the options.
    for code in re.findall(r'^data: .*"code": ?(5\d\d)', response.text, re.MULTILINE):
        return f"status {code} in a stream: {_kind(response.text)}"
    if '"internal_error"' in response.text:
        return INTERNAL
    if response.status_code >= 400 and len(response.content) > MAX_ANSWER:
        return f"a refusal of {len(response.content)} bytes"
    return None


def _kind(text: str) -> str:
    """An error without numbers and names, so that alike ones count together."""
    found = re.search(r'"message": ?"((?:[^"\\]|\\.)*)"', text)
    message = found[1] if found else text
    message = re.sub(r"'[^']*'|\\\"[^\"]*\\\"|0x[0-9a-f]+|[\d.]+", "...", message)
    return message[:160].encode("ascii", "backslashreplace").decode()


def send_all(client: httpx.Client, everything: Sequence[Sent], report: Report) -> list[Sent]:
    """Send all of it; return what was answered wrongly, as `report.findings` has it."""
    reference, failed = _tokens(client), []
    for number, sent in enumerate(track(everything, "Requests")):
        report.sent[sent.label] += 1
        try:
            response = client.request(**sent.request)
        except httpx.HTTPError as error:
            what, answer = f"no answer: {type(error).__name__}", str(error)
        else:
            report.statuses[f"{response.status_code // 100}xx"] += 1
            found = wrong(response)
            if found is None and number % EVERY:
                continue
            what, answer = found or "", response.text
        if what:
            body = sent.request["content"][:600].decode("utf-8", "replace")
            report.findings.append(Finding(sent.label, what, body, answer[:600]))
            failed.append(sent)
        report.checks += 1
        if _tokens(client) != reference:
            raise RunError(f"After request {number} ({sent.label}) a good request is disturbed.")
    return failed


def _tokens(client: httpx.Client) -> list[int]:
    """Of a request that is well formed; RunError if there is no answer."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    try:
        response = client.post("/v1/completions", json=body)
        return list(response.json()["choices"][0]["token_ids"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise RunError(f"A well-formed request has no answer: {error!r}.") from None


def compare(client: httpx.Client, failed: Sequence[Sent], findings: Sequence[Finding]) -> None:
    """Send what went wrong to a server without the plugin; the same answer makes it vLLM's."""
    for sent, finding in zip(track(failed, "Without the plugin"), findings, strict=True):
        request = sent.request
        if finding.what == INTERNAL:
            # It takes our options, whatever they say; so it gets an error of its own in a stream.
            request = {**request, "content": json.dumps(_failing_stream()).encode()}
        found: str | None
        try:
            response = client.request(**request)
        except httpx.HTTPError as error:
            found = f"no answer: {type(error).__name__}"
        else:
            found, finding.stock = wrong(response), response.text[:600]
        finding.alone = found != finding.what


def _failing_stream() -> dict[str, Any]:
    """A body of ``/v1/messages`` that vLLM alone cannot send to its engine."""
    body = {"model": MODEL, "max_tokens": 1, "stream": True, "vllm_xargs": {"other": "\ud800"}}
    return {**body, "messages": [{"role": "user", "content": "x"}]}


@contextmanager
def served(
    console: Console, log: Path, options: Sequence[str], more: dict[str, str] | None = None
) -> Any:
    """A client of a server that is running."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(PROBE_MODEL), *OPTIONS]
    command += ["--port", str(port), *options]
    with running_server(command, log, more) as process:
        url = f"http://127.0.0.1:{port}"
        with progress(console) as show:
            wait_until_ready(process, url, log, show, limit=START_LIMIT)
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            yield client


def main(argv: Sequence[str] | None = None) -> int:
    """Run all of it; 1 if anything is wrong that is not vLLM's own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=60, help="requests of each path and document")
    parser.add_argument("--values", type=int, default=100, help="values of each of our options")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=SCRIPTS.parent / "build" / "bad-input")
    args = parser.parse_args(argv)
    console, report, start = Console(), Report(), time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with served(console, args.out / "server.log", OURS) as client:
            document = client.get("/openapi.json").json()
            everything = [
                *requests_of(document, "whole", args.count, args.seed),
                *requests_of(narrowed(document, MODEL), "narrowed", args.count, args.seed),
                *values_of_options(args.values, args.seed),
                *known_faults(),
            ]
            failed = send_all(client, everything, report)
        if failed:
            stock = {"VLLM_PLUGINS": stock_plugins()}
            with served(console, args.out / "stock.log", [], stock) as client:
                compare(client, failed, report.findings)
    except RunError as error:
        console.print(f"bad_input: {error}", markup=False)
        return 1
    finally:
        report.write(args.out / "report.json", time.monotonic() - start)
    _show(console, report)
    return int(any(each.alone for each in report.findings))


def _show(console: Console, report: Report) -> None:
    total, statuses = sum(report.sent.values()), dict(sorted(report.statuses.items()))
    lines = [f"{total} requests: {statuses}; {report.checks} good ones between them, all alike."]
    kinds = Counter(
        (each.alone, each.label.partition(" (")[0], each.what) for each in report.findings
    )
    for (alone, where, what), count in sorted(kinds.items(), reverse=True):
        lines.append(f"{'OURS' if alone else 'vLLM'}  {count} x {where}: {what}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
