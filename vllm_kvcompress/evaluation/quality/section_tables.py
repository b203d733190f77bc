"""The report's details: tables of tasks and texts, answers, failures, how it was measured."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from vllm_kvcompress.evaluation.quality import text
from vllm_kvcompress.evaluation.quality.answers import find_drifts
from vllm_kvcompress.evaluation.quality.cells import (
    Cell,
    unique,
)
from vllm_kvcompress.evaluation.quality.page import (
    definitions,
    details,
    paragraph,
    quoted,
    table,
    td,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE
from vllm_kvcompress.evaluation.quality.view import Run, chart_grid, figure

MOST_FLIPS = 50
MOST_CHARACTERS = 400
FEW_ROWS = 40  # tables of all tasks together that are shown unfolded

# --- tables per task ----------------------------------------------------------------------


def per_task(run: Run) -> str:
    """All settings of every task."""
    groups = [
        (task, protocol, cells)
        for protocol in run.protocols
        for task in run.tasks
        if (
            cells := [
                cell for cell in run.pooled if cell.task == task and cell.protocol == protocol
            ]
        )
    ]
    if not groups:
        return ""
    few = sum(len(cells) for *_, cells in groups) <= FEW_ROWS
    words = (
        "Scores 0 to 100 with 95 % intervals. Difference, share, answer length, lost and gained "
        "are against the whole cache on the same samples: lost were right (a score of 50 or more) "
        "and became wrong, gained the other way round. All lengths apart are in cells.csv."
    )
    parts = [paragraph(words)]
    for number, (task, protocol, cells) in enumerate(groups):
        name = f"{task}, {protocol}" if len(run.protocols) > 1 else task
        body = _task_table(run, task, protocol, cells) + _length_charts(run, number, cells)
        parts.append(details(f"{name} ({text.counted(len(cells), 'setting')})", body, few))
    return "".join(parts)


def _by_length(run: Run, task: str, protocol: str) -> dict[tuple[str, float, int | None], Cell]:
    return {
        (cell.policy, cell.budget, cell.length): cell
        for cell in run.cells
        if (cell.task, cell.protocol) == (task, protocol)
    }


def _task_table(run: Run, task: str, protocol: str, cells: Sequence[Cell]) -> str:
    apart = _by_length(run, task, protocol)
    lengths = sorted({key[2] or 0 for key in apart})
    if len(lengths) == 1:
        lengths = []
    rows, kinds, before = [], [], ""
    for cell in sorted(cells, key=run.order):
        ends = [_length_cell(apart.get((cell.policy, cell.budget, length))) for length in lengths]
        rows.append([run.label(cell.policy), *_setting(cell, task in run.continuation), *ends])
        base = cell.policy == BASELINE
        kinds.append("base" if base else "first" if cell.policy != before else "")
        before = cell.policy
    headers = ["", "budget", "kept", "samples", "score", "difference\nto whole cache"]
    headers += ["share\nof whole", "answers\nlength ratio", "lost", "gained"]
    headers += [f"{text.tokens(length)}\nscore" for length in lengths]
    return table(f"Scores of {task}, protocol {protocol}", headers, rows, "", kinds)


def _length_cell(cell: Cell | None) -> str:
    if cell is None:
        return td(text.NOTHING)
    return td(text.percent(cell.mean), data=_where(cell) | {"length": cell.length})


def _where(cell: Cell) -> dict[str, object]:
    """What a number belongs to, for programs that read the page."""
    return {
        "task": cell.task,
        "protocol": cell.protocol,
        "policy": cell.policy,
        "budget": cell.budget,
    }


def _setting(cell: Cell, is_text: bool) -> Iterator[str]:
    where = _where(cell)
    yield td(text.share(cell.budget))
    yield td(text.share(cell.kept))
    yield td(f"{cell.n:,}")
    yield td(text.percent(cell.mean), (), "", where, text.percent_interval(cell.interval))
    against = cell.against
    if against is None:
        yield from (td(text.NOTHING) for _ in range(5))
        return
    few = [f"{against.n:,} of {cell.n:,}"] if against.n < cell.n else []
    step = text.signed(against.mean - against.baseline)
    yield td(step, few, beside=text.signed_interval(against.difference))
    yield td(text.NOTHING if against.share is None else f"{text.percent(against.share)} %")
    yield td(text.number(None if is_text else against.drift))
    for count in (against.lost, against.gained):
        yield td(text.NOTHING if is_text else f"{count:,}")


def _length_charts(run: Run, number: int, cells: Sequence[Cell]) -> str:
    """A chart per length, where a task has several."""
    task, protocol = cells[0].task, cells[0].protocol
    apart = _by_length(run, task, protocol).values()
    lengths = sorted({cell.length or 0 for cell in apart})
    if len(lengths) == 1 or not run.policies:
        return ""
    x_label = "share of cache bytes kept" if run.has_kept else "asked budget"
    figures = []
    for length in lengths:
        mine = [cell for cell in apart if cell.length == length]
        name = text.tokens(length)
        caption = (f"{name} tokens" if length else name, text.counted(mine[0].n, "sample"))
        title = f"{task} at {caption[0]} against {x_label}"
        ident = f"len{number}-{length}"
        figures.append(figure(run, ident, mine, caption, title, x_label))
    return chart_grid(run, figures)


# --- predicted texts ----------------------------------------------------------------------


def continuation(run: Run) -> str:
    """Agreement, KL and perplexity of tasks that predict a text."""
    cells = [cell for cell in run.pooled if cell.task in run.continuation]
    if not cells:
        return ""
    words = (
        "How well the cache predicts the text that follows, token by token. Agreement: positions "
        "where the likeliest token is the whole cache's, in percent. KL: mean divergence of the "
        "next token's probabilities from the whole cache's, in nats. Perplexity: exp of the mean "
        "negative log-likelihood per token."
    )
    parts = [paragraph(words)]
    for protocol in run.protocols:
        for task in run.tasks:
            mine = [cell for cell in cells if (cell.task, cell.protocol) == (task, protocol)]
            if mine:
                parts += [run.heading(protocol), _continuation_table(run, task, mine)]
    return "".join(parts)


def _continuation_table(run: Run, task: str, cells: Sequence[Cell]) -> str:
    rows, kinds = [], []
    for cell in sorted(cells, key=run.order):
        base = cell.policy == BASELINE
        bounds = "" if base else text.percent_interval(cell.interval)
        rows.append(
            [
                run.label(cell.policy),
                td(text.share(cell.budget)),
                td(text.share(cell.kept)),
                td(f"{cell.n:,}"),
                td(text.percent(cell.mean), beside=bounds),
                td(text.number(cell.kl, 4), data=_where(cell) | {"kl": cell.kl}),
                td(text.perplexity(cell.nll), data=_where(cell) | {"nll": cell.nll}),
            ]
        )
        kinds.append("base" if base else "")
    headers = [task, "budget", "kept", "samples", "agreement", "KL\nnats", "perplexity"]
    return table(f"Prediction of {task}", headers, rows, "", kinds)


# --- answers ------------------------------------------------------------------------------


def drift(run: Run) -> str:
    """Lengths of answers against the whole cache's."""
    found = find_drifts(each for each in run.records if each.task not in run.continuation)
    if not found:
        return ""
    words = (
        "Mean tokens of the answers over the whole cache's on the same samples, all tasks "
        "together. Far above 1: answers that ramble or never end; far below: broken off."
    )
    parts = [paragraph(words)]
    for protocol in run.protocols:
        by_setting = {(e.policy, e.budget): e for e in found if e.protocol == protocol}
        rows = []
        for name in run.policies:
            if not any(key[0] == name for key in by_setting):
                continue
            cells = []
            for budget in run.budgets:
                each = by_setting.get((name, budget))
                tokens = f"{each.mean:.1f} for {each.baseline:.1f}" if each else ""
                cells.append(td(text.number(each.ratio), [tokens]) if each else td(text.NOTHING))
            rows.append([run.label(name), *cells])
        if rows:
            headers = ["", *(f"{text.share(budget)}\nbudget" for budget in run.budgets)]
            caption = f"Lengths of answers, protocol {protocol}"
            parts += [run.heading(protocol), table(caption, headers, rows)]
    return "".join(parts)


def flipped(run: Run) -> str:
    """Answers that changed sides."""
    if not run.has_baseline or not run.policies:
        return ""
    if not run.flips:
        return paragraph("No answer changed from right to wrong or from wrong to right.")
    lost = sum(flip.lost for flip in run.flips)
    shown = run.flips[:MOST_FLIPS]
    words = (
        f"{text.counted(len(run.flips), 'answer')} changed sides: {lost:,} lost (right under the "
        f"whole cache, wrong under the compressed one), {len(run.flips) - lost:,} gained."
    )
    first = (
        f"The first {len(shown)} of {len(run.flips):,}" if len(shown) < len(run.flips) else "All"
    )
    rows = []
    for flip in shown:
        before, after = flip.before, flip.after
        answers = (text.shortened(each.answer, MOST_CHARACTERS) for each in (before, after))
        name = f"{text.escape(after.sample)}<small>{text.escape(after.task)}</small>"
        setting = f"{text.share(after.budget)} budget, {after.protocol}"
        step = " → ".join(text.percent(each.score) for each in (before, after))
        rows.append(
            [name, td(after.policy, [setting]), td(step, kind="tight"), *map(quoted, answers)]
        )
    headers = ["sample\ntask", "policy", "score", "whole cache's answer", "compressed answer"]
    body = table("Answers that changed sides", headers, rows, "words")
    order = ", lost ones first, from large budgets to small ones, tasks in turn"
    return paragraph(words) + details(f"{first}{order}", body)


def failures(run: Run) -> str:
    """Samples that could not be measured, by reason."""
    if not run.failures:
        return paragraph("Every sample that was tried could be measured.")
    groups = defaultdict(list)
    for each in run.failures:
        groups[str(each.get("why", "no reason given"))].append(each)
    rows = []
    for why, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        tasks = text.listed(dict.fromkeys(str(each.get("task", "?")) for each in found))
        samples = text.listed([str(each.get("sample", "?")) for each in found], 5)
        rows.append([f"{len(found):,}", quoted(text.shortened(why, 1000)), td(tasks), td(samples)])
    measured = {(record.task, record.sample) for record in run.records}
    some = sum((each.get("task"), each.get("sample")) in measured for each in run.failures)
    words = f"{text.counted(len(run.failures), 'sample')} could not be measured when tried"
    if some:
        words += f"; {some:,} of them could, under another setting or at another try"
    words += ". The same command tries again what is missing."
    headers = ["count", "why", "tasks", "samples"]
    return paragraph(words) + table("Failures by reason", headers, rows, "words")


# --- how ----------------------------------------------------------------------------------


def how(run: Run) -> str:
    """Command, versions, and what the numbers mean."""
    parts = []
    command = run.measured_with.get("command")
    if command:
        words = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        parts.append(f"<pre>{text.escape(words)}</pre>")
    rows = [(n, text.said(v)) for n, v in run.measured_with.items() if n != "command"]
    if rows:
        parts.append(definitions(rows))
    seconds = sum(record.seconds for record in unique(run.records))
    parts.append(
        paragraph(
            f"Measuring took {text.counted(round(seconds), 'second')}, shared prefills not "
            "counted. Intervals are 95 %: Wilson's for scores of 0 or 1, otherwise a bootstrap "
            "over samples; Newcombe's method 10 or a bootstrap for differences on the same "
            "samples; Zou and Donner's sum of parts for means over tasks. They say how far other "
            "samples of the same tasks could move a number, not how far another model or text "
            "would. Nothing is corrected for the number of comparisons.",
            "note",
        )
    )
    return "".join(parts)
