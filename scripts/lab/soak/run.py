"""The course of a soak: what each question's answer is alone, load, an idle server."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.errors import RunError
from lab.soak import checks, inside
from lab.soak.checks import Reference
from lab.soak.client import Answer, Client, by_label, total
from lab.soak.findings import Report
from lab.soak.processes import Watch, read
from lab.soak.questions import LOSSLESS, Question, Request

SESSIONS = "vllm:kv_compression_session"
PREFIXES = "vllm:kv_compression_shared_prefix"
COUNTED = {
    "preemptions": "vllm:num_preemptions_total",
    "requests compressed": "vllm:kv_compression_requests_total",
    "compactions": "vllm:kv_compression_compactions_total",
    "prefix cache hits, tokens": "vllm:prefix_cache_hits_total",
    "session tokens": f"{SESSIONS}_tokens_total",
    "shared prefix tokens": f"{PREFIXES}_tokens_total",
    "deferrals": "vllm:kv_compression_deferrals_total",
}
RESETS = 1 / 250
"""Chance that the prefix cache is emptied before a request is sent, running requests or not."""

Show = Callable[[str, int, int], None]
"""Told what is done now, how many of it are done, and of how many."""


@dataclass
class Soak:
    """A soak of one running server.

    Parameters
    ----------
    client : Client
        Of the server.
    watch : Watch
        Of its processes.
    folder : pathlib.Path
        The server was started with ``inside.environment(folder)``.
    report : Report
        Is filled.
    show : callable
        Told how far it is.
    concurrency : int
        Requests under way at once.
    depends_on_load : bool
        As `lab.soak.settings.Setting`.
    """

    client: Client
    watch: Watch
    folder: Path
    report: Report
    show: Show
    concurrency: int = 20
    depends_on_load: bool = False
    references: dict[str, Reference] = field(default_factory=dict)
    questions: dict[str, Question] = field(default_factory=dict)
    second_turns: dict[str, Question] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    # --- alone ----------------------------------------------------------------------------

    async def alone(self, questions: Sequence[Question]) -> None:
        """Ask each question of the idle server, with an empty prefix cache."""
        start, report = time.monotonic(), self.report
        for number, question in enumerate(questions):
            self.show("asking alone", number, len(questions))
            await self._empty()
            answer = await self._one(question)
            reference = Reference(answer.tokens)
            if question.kind == "conversation":
                reference = replace(reference, second_turns=await self._turns(question, answer))
            self.references[question.name] = reference
            self.questions[question.name] = question
        report.questions = dict(Counter(each.kind for each in questions))
        report.distinct_answers = checks.differ(questions, self.references)
        await self._empty()
        self.sizes = (await self.books("before the load"))["sizes"]
        report.seconds["alone"] = time.monotonic() - start

    async def _one(self, question: Question, **xargs: Any) -> Answer:
        request = Request(0, question.name, max_tokens=question.max_tokens)
        asked = replace(question, xargs=question.xargs | xargs)
        answer = await self.client.ask(asked, request)
        if answer.outcome != "finished":
            raise RunError(f"{question.name}, asked alone: {answer.outcome}: {answer.error}")
        return answer

    async def _turns(self, question: Question, first: Answer) -> list[list[int]]:
        """Answers to the second turn: continued, and anew."""
        second = question.second_turn(first.tokens[0])
        self.second_turns[question.name] = second
        await self._empty()
        anew = await self._one(second)
        await self._empty()
        await self._one(question, kv_session=question.name)
        before = await self.client.metric(f"{SESSIONS}_requests_total", outcome="reused")
        continued = await self._one(second, kv_session=question.name)
        after = await self.client.metric(f"{SESSIONS}_requests_total", outcome="reused")
        if after != before + 1:
            self.report.fail(
                "session", "alone, the second turn did not go on", question=question.name
            )
        return [continued.tokens[0], anew.tokens[0]]

    async def _empty(self) -> None:
        for _ in range(120):
            if await self.client.reset():
                return
            await asyncio.sleep(0.25)
        raise RunError("/reset_prefix_cache kept failing: blocks are held by nobody's requests.")

    async def books(self, when: str) -> Mapping[str, Any]:
        """What `lab.load_checks` says inside of the idle engine."""
        (self.folder / inside.ASK).touch()
        emptied = await self.client.reset()
        if not emptied:
            self.report.fail(
                "pool", f"{when}: the prefix cache of the idle server cannot be emptied"
            )
        found = inside.books_of(self.folder)
        if found is None:
            raise RunError("The engine did not show its books.")
        if found["wrong"]:
            self.report.fail("books", f"{when}: {found['wrong']}")
        return found

    # --- load -----------------------------------------------------------------------------

    async def load(self, requests: Sequence[Request], limit: float = float("inf")) -> None:
        """Send all requests, so many at once, and hold what comes back against the references.

        Parameters
        ----------
        requests : sequence of Request
            In order.
        limit : float
            Seconds after which no more are sent.
        """
        start, report = time.monotonic(), self.report
        rng = random.Random(f"resets {report.seed}")
        before = await self.client.metrics()
        waiting = iter(requests)
        sent: list[Request] = []
        done = 0

        async def send() -> None:
            nonlocal done
            for request in waiting:
                if time.monotonic() - start > limit:
                    return
                sent.append(request)
                if rng.random() < RESETS:
                    report.resets += await self.client.reset(running=True)
                await self._check(request)
                done += 1

        clients = [asyncio.create_task(send()) for _ in range(self.concurrency)]
        share = 0.0
        try:
            while not all(each.done() for each in clients):
                self.show("under load", done, len(requests))
                self.watch.look()
                now = max(done / len(requests), (time.monotonic() - start) / limit)
                if now >= share + 0.05:
                    share = now
                    self._remember(done)
                await asyncio.wait(clients, timeout=1)
        finally:  # interrupted: nobody asks a client that is closed
            for each in clients:
                each.cancel()
        for each in clients:
            each.result()
        report.seconds["load"] = time.monotonic() - start
        report.asked, report.fates = len(requests), dict(Counter(each.fate for each in sent))
        after = await self._settle(done)
        report.counted = {
            name: total(after, metric) - total(before, metric) for name, metric in COUNTED.items()
        }
        report.policies = by_label(after, "vllm:kv_compression_requests_total", "policy")

    def _remember(self, done: int) -> None:
        readings = [each.as_json() for each in read(self.watch.pid)]
        self.report.memory.append({"requests": done, "processes": readings})

    async def _check(self, request: Request) -> None:
        question, reference = self.questions[request.question], self.references[request.question]
        if request.fate == "conversation":
            await self._converse(request, question, reference)
            return
        if self._is_free(question):
            request = replace(request, stop_at=None)
        answer = await self.client.ask(question, request, checks.stop_token(request, reference))
        wrong = checks.wrong_answer(request, self.reference(request, answer), answer)
        self._judge(request, question, answer, wrong)

    def _is_free(self, question: Question) -> bool:
        """Whether the load may decide on the tokens."""
        return self.depends_on_load and question.kind not in LOSSLESS

    def reference(self, request: Request, answer: Answer) -> Reference:
        """What an answer must be."""
        reference = self.references[request.question]
        if self._is_free(self.questions[request.question]):
            return checks.any_tokens(reference, answer)
        return reference

    async def _converse(self, request: Request, question: Question, reference: Reference) -> None:
        """Both turns; the second before all others, so that it is not preempted half-way."""
        name = {"kv_session": f"chat {request.number}"}
        first = replace(question, xargs=question.xargs | name)
        answer = await self.client.ask(first, request)
        wrong = checks.wrong_answer(request, reference, answer)
        self._judge(request, first, answer, wrong)
        if wrong:
            return
        turn = self.second_turns[question.name]
        second = replace(turn, xargs=turn.xargs | name)
        ask = replace(request, priority=-9)
        answer = await self.client.ask(second, ask)
        self._judge(ask, second, answer, checks.wrong_second_turn(reference, answer))
        if answer.outcome == "finished" and answer.tokens[0] in reference.second_turns:
            same = reference.second_turns[0] == reference.second_turns[1]
            kind = ("went on", "anew")[reference.second_turns.index(answer.tokens[0])]
            kind = "either: both are the same" if same else kind
            self.report.second_turns[kind] = self.report.second_turns.get(kind, 0) + 1

    def _judge(self, request: Request, question: Question, answer: Answer, wrong: str) -> None:
        report = self.report
        report.outcomes[answer.outcome] = report.outcomes.get(answer.outcome, 0) + 1
        compared = 0 if self._is_free(question) else checks.num_compared(request, answer)
        report.answers_compared += compared > 0
        report.tokens_compared += compared
        if wrong:
            print(f"request {request.number}, {question.name}: {wrong}", flush=True)
            report.fail(
                "answer", wrong, request=request.as_json(), question=question.name,
                body=question.body("MODEL", request.max_tokens) | request.extra,
                found=answer.tokens, expected=self.references[request.question].tokens,
            )  # fmt: skip

    async def _settle(self, count: int) -> str:
        """After the load: an idle server, a whole pool, nothing remembered; its /metrics."""
        report = self.report
        self.show("under load", count, count)
        if not await self.client.idle(60):
            report.fail(
                "idle", "requests are still running or waiting a minute after the last answer"
            )
        after = await self.client.metrics()
        found = await self.books("after the load")
        report.containers = self._grown(found)
        await asyncio.sleep(2)
        self._remember(count)
        for wrong in self.grown(count):
            report.fail("memory", wrong)
        # A step renews the gauges.
        await self.client.ask(
            Question("last", "server", [5, 6, 7], 2), Request(0, "last", max_tokens=2)
        )
        await self.client.idle(60)
        await self.client.reset()
        text = await self.client.metrics()
        self._kept_left(text)
        return after

    def _grown(self, found: Mapping[str, Any]) -> dict[str, int]:
        """Containers that are longer than before the load, by how much."""
        before, after = self.sizes, found["sizes"]
        for wrong in checks.grown_containers(before, after):
            self.report.fail("books", wrong)
        more = {path: size - before.get(path, 0) for path, size in after.items()}
        return {path: size for path, size in more.items() if size > 0}

    def grown(self, count: int) -> list[str]:
        """Processes that grew too much from a quarter of the requests on."""
        marks = {each["requests"]: each["processes"] for each in self.report.memory}
        quarter = min((each for each in marks if each >= count / 4), default=count)
        readings = [[checks.Reading(**each) for each in marks[mark]] for mark in (quarter, count)]
        return checks.growth(readings[0], readings[1])

    def _kept_left(self, text: str) -> None:
        """Caches that are kept for later, by the server's own counters: none, after a reset."""
        reused = total(text, f"{SESSIONS}_requests_total", outcome="reused")
        left = {
            "conversations kept": total(text, f"{SESSIONS}s_kept_total")
            - total(text, f"{SESSIONS}s_given_back_total") - reused,
            "prefixes kept": total(text, f"{PREFIXES}es_kept_total")
            - total(text, f"{PREFIXES}es_given_back_total"),
            "requests running": total(text, "vllm:num_requests_running"),
            "requests waiting": total(text, "vllm:num_requests_waiting"),
        }  # fmt: skip
        self.report.kept_left = left
        for name, count in left.items():
            if count:
                self.report.fail("metrics", f"after a reset, {name}: {count:g}")
