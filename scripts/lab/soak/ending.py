"""SIGTERM under load: the server's end, its clients', and what lives on."""

import asyncio
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lab.soak import checks
from lab.soak.client import Answer, total
from lab.soak.questions import Request
from lab.soak.run import Soak

TAIL = 20
"""Requests that are under way when the server is told to end."""
GRACE = 20.0
"""Seconds that a server may take to end, beside its own --shutdown-timeout."""


async def terminate(
    soak: Soak, process: subprocess.Popen[bytes], requests: Sequence[Request], timeout: float
) -> None:
    """SIGTERM under load.

    Parameters
    ----------
    soak : Soak
        Has asked alone what is asked now.
    process : subprocess.Popen
        The server.
    requests : sequence of Request
        That are under way when it is told to end.
    timeout : float
        The server's --shutdown-timeout.
    """
    report = soak.report
    whole = [
        replace(
            each, fate="finish", extra={}, stop_at=None, leave_after=0,
            max_tokens=soak.questions[each.question].max_tokens,
        )
        for each in requests
        if each.fate not in ("refused", "conversation")
    ]  # fmt: skip
    clients = [
        asyncio.create_task(soak.client.ask(soak.questions[each.question], each)) for each in whole
    ]
    for _ in range(100):
        soak.watch.look()
        text = await soak.client.metrics()
        running = total(text, "vllm:num_requests_running")
        if running + total(text, "vllm:num_requests_waiting") >= len(whole) / 2:
            break
        await asyncio.sleep(0.1)
    soak.watch.look()
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    limit = timeout + GRACE
    while process.poll() is None and time.monotonic() - start < limit:
        soak.watch.look()
        await asyncio.sleep(0.2)
    seconds = time.monotonic() - start
    if process.poll() is None:
        report.fail("ending", f"the server still runs {seconds:.0f} s after SIGTERM")
    elif process.returncode not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
        report.fail("ending", f"the server ended with exit code {process.returncode}")
    _, hanging = await asyncio.wait(clients, timeout=10)
    for each in hanging:
        each.cancel()
    if hanging:
        report.fail("ending", f"{len(hanging)} clients wait for a server that is gone")
    answers = [each.result() for each in clients if each not in hanging]
    for request, answer in zip(whole, answers, strict=False):
        _judge(soak, request, answer)
    orphans = soak.watch.orphans()
    for orphan in orphans:
        report.fail("orphan", f"{soak.watch.names[orphan.pid]} ({orphan.pid}) lives on")
    files = soak.watch.files_left()
    if files:
        report.fail("shared memory", f"left behind: {', '.join(files)}")
    report.ending = {
        "seconds": round(seconds, 1), "limit": limit, "exit code": process.poll(),
        "processes before": sorted(soak.watch.names.values()), "orphans": len(orphans),
        "shared files seen": len(soak.watch.files), "shared files left": len(files),
        "clients": dict(Counter(each.outcome for each in answers)),
        "clients were told": dict(Counter(each.error[:100] for each in answers if each.error)),
    }  # fmt: skip
    for orphan in orphans:
        orphan.kill()


def _judge(soak: Soak, request: Request, answer: Answer) -> None:
    """The whole answer, or its beginning and a word that it ends here."""
    if answer.outcome == "hung":
        soak.report.fail("ending", f"request {request.number} hung")
        return
    aborted = "abort" in answer.reasons
    reference = soak.reference(request, answer)
    if answer.outcome == "finished" and not aborted:
        wrong = checks.wrong_answer(request, reference, answer)
    else:
        told = Answer("left", answer.tokens, answer.reasons)
        wrong = checks.wrong_answer(request, reference, told)
        if not answer.error and not aborted:
            wrong = wrong or "ended without an error"
    if wrong:
        soak.report.fail("answer", f"at the end: {wrong}", request=request.as_json())
