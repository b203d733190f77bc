"""The report's overview: what was asked, means over tasks, charts, needles."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm_kvcompress.evaluation.quality import charts, text
from vllm_kvcompress.evaluation.quality.cells import (
    Overall,
    unique,
)
from vllm_kvcompress.evaluation.quality.page import (
    across,
    definitions,
    details,
    paragraph,
    table,
    td,
)
from vllm_kvcompress.evaluation.quality.records import BASELINE, Record
from vllm_kvcompress.evaluation.quality.view import FEW_POLICIES, Run, chart_grid, figure

MOST_DEPTHS = 11
FALLS = "\N{BLACK DOWN-POINTING TRIANGLE}"
RISES = "\N{BLACK UP-POINTING TRIANGLE}"


# --- what was asked -----------------------------------------------------------------------


def asked(run: Run) -> str:
    """The setting in words and as in run.json."""
    measured = unique(run.records)
    samples = {(each.task, each.sample) for each in measured}
    parts = [
        text.counted(len(samples), "sample"),
        text.counted(len(run.tasks), "task"),
        text.counted(len(run.policies), "policy", "policies"),
        text.counted(len(run.budgets), "budget"),
    ]
    if not run.policies:
        parts[2:] = ["the whole cache alone"]
    protocols = {
        "visible": "visible: the question is compressed together with the text",
        "hidden": "hidden: the text is compressed before the question is known",
    }
    said = [protocols.get(name, name) for name in run.protocols]
    sentence = f"{', '.join(parts[:-1])} and {parts[-1]}; {text.counted(len(measured), 'record')}."
    if said:
        sentence += f" Protocol {'; '.join(said)}."
    rows = [(name, text.said(value)) for name, value in run.asked.items()]
    return paragraph(sentence) + (definitions(rows) if rows else "") + _warnings(run)


def _warnings(run: Run) -> str:
    found = []
    if not run.records:
        found.append("Nothing was measured yet.")
    elif not run.has_baseline:
        found.append(
            "The whole cache was not measured (no records of the policy “none”): there are no "
            "shares of a baseline, no differences and no flips."
        )
    if run.records and not run.has_kept:
        found.append(
            "The share of bytes kept is not known for every record; charts use the asked budget."
        )
    if run.failures:
        found.append(
            f"{text.counted(len(run.failures), 'sample')} could not be measured when tried; "
            "see the reasons at the end."
        )
    return "".join(paragraph(each, "warn") for each in found)


# --- headline -----------------------------------------------------------------------------


def headline(run: Run) -> str:
    """Means over tasks: a row per policy, a column per budget."""
    if not run.overall:
        return ""
    words = "Mean score over tasks, 0 to 100, with its 95 % interval; every task counts the same."
    below = ["the share of the whole cache's score on the same samples"] * run.has_baseline
    below += ["the share of cache bytes held"] * any(e.kept is not None for e in run.overall)
    if below and run.policies:
        words += f" Below it: {', and '.join(below)}."
    parts = [paragraph(words)]
    for protocol in run.protocols:
        found = [each for each in run.overall if each.protocol == protocol]
        if found:
            parts += [run.heading(protocol), _headline_table(run, protocol, found)]
    note = "The best of a column is shaded. " if len(run.policies) > 1 else ""
    if any(each.difference for each in run.overall):
        note += (
            f"{FALLS} {RISES}: below or above the whole cache, where the 95 % interval of the "
            "paired difference leaves out 0. "
        )
    if run.continuation:
        names = text.listed(sorted(run.continuation))
        note += f"Not in these means: {names}, whose score is agreement, not right answers."
    return "".join([*parts, paragraph(note, "note") if note else ""])


def _headline_table(run: Run, protocol: str, found: Sequence[Overall]) -> str:
    by_setting = {(each.policy, each.budget): each for each in found}
    budgets = [each for each in run.budgets if any(key[1] == each for key in by_setting)]
    policies = [name for name in run.policies if any(key[0] == name for key in by_setting)]
    most = max(each.tasks for each in found)
    best = {
        budget: max(each.mean for each in found if each.budget == budget and each.tasks == most)
        for budget in budgets
        if sum(each.budget == budget and each.tasks == most for each in found) > 1
    }
    rows, kinds = [], []
    for each in found:
        if each.policy == BASELINE:
            whole = _headline_cell(each, most, "left")
            rows.append([run.label(BASELINE), across(whole, len(budgets))])
            kinds.append("base")
    for name in policies:
        cells = []
        for budget in budgets:
            one = by_setting.get((name, budget))
            shaded = one is not None and one.mean == best.get(budget) and one.tasks == most
            cells.append(
                _headline_cell(one, most, "best" if shaded else "") if one else td(text.NOTHING)
            )
        rows.append([run.label(name), *cells])
    headers = ["", *(f"{text.share(budget)}\nbudget" for budget in budgets)]
    if not budgets:
        headers.append("score")
    return table(f"Mean scores, protocol {protocol}", headers, rows, "headline", kinds)


def _headline_cell(each: Overall, most: int, kind: str) -> str:
    small = []
    if each.share is not None:
        small.append(f"{text.percent(each.share)} % of whole{_arrow(each)}")
    if each.kept is not None and each.policy != BASELINE:
        small.append(f"holds {text.share(each.kept)}")
    if each.tasks < most:
        small.append(f"{each.tasks} of {most} tasks")
    where = {"protocol": each.protocol, "policy": each.policy, "budget": each.budget}
    bounds = text.percent_interval(each.interval)
    return td(text.percent(each.mean), small, kind, where, bounds)


def _arrow(each: Overall) -> str:
    if each.difference is None:
        return ""
    if each.difference.high < 0:
        return f" {FALLS}"
    return f" {RISES}" if each.difference.low > 0 else ""


# --- charts -------------------------------------------------------------------------------


def accuracy(run: Run) -> str:
    """One chart per task: score against what is kept."""
    if not run.records:
        return ""
    x_label = "share of cache bytes kept" if run.has_kept else "asked budget (bytes kept unknown)"
    scale = f"{x_label[0].upper()}{x_label[1:]}, on a logarithmic scale"
    words = f"Score, 0 to 100, over all lengths of a task. {scale}. Bars are 95 % intervals"
    many = len(run.policies) > FEW_POLICIES
    words += "; with this many policies they show for the one under the pointer. " if many else ". "
    words += "The dashed line across is the whole cache with its interval." * run.has_baseline
    parts = [paragraph(words), _legend(run)]
    for place, protocol in enumerate(run.protocols):
        figures = [
            _figure(run, f"line{place}-{number}", task, protocol, x_label)
            for number, task in enumerate(run.tasks)
            if any(cell.task == task and cell.protocol == protocol for cell in run.pooled)
        ]
        parts += [run.heading(protocol), chart_grid(run, figures)]
    return "".join(parts)


def _legend(run: Run) -> str:
    if not run.policies:
        return ""
    labels = "".join(
        f'<label><input type="checkbox" id="show{index}" checked autocomplete="off">'
        f"{charts.swatch(index)}{text.escape(name)}</label>"
        for index, name in enumerate(run.policies)
    )
    kind = "legend few" if len(run.policies) <= FEW_POLICIES else "legend"
    return f'<fieldset class="{kind}"><legend>Policies; untick to hide</legend>{labels}</fieldset>'


def _figure(run: Run, ident: str, task: str, protocol: str, x_label: str) -> str:
    cells = [cell for cell in run.pooled if cell.task == task and cell.protocol == protocol]
    title = f"{task}: {'agreement' if task in run.continuation else 'score'} against {x_label}"
    count = max(cell.n for cell in cells)
    return figure(run, ident, cells, (task, text.counted(count, "sample")), title, x_label)


# --- needles ------------------------------------------------------------------------------


def needles(run: Run) -> str:
    """Depth against length for tasks that have needles: a row per policy, a column per budget."""
    parts: list[str] = []
    for place, protocol in enumerate(run.protocols):
        shown: list[str] = []
        for number, task in enumerate(run.tasks):
            records = [
                record
                for record in unique(run.records)
                if (record.task, record.protocol) == (task, protocol) and record.depth is not None
            ]
            if records:
                maps = _maps(run, f"heat{place}-{number}", records)
                shown.append(details(task, maps, is_open=not shown and not parts))
        if shown:
            parts += [run.heading(protocol), *shown]
    if not parts:
        return ""
    words = (
        "Score, 0 to 100, by where the needle is (down: 0 % is the beginning of the text) and by "
        "length in tokens (across). The stronger the colour, the more is lost; an empty cell was "
        "not measured."
    )
    return paragraph(words) + "".join(parts)


def _maps(run: Run, ident: str, records: Sequence[Record]) -> str:
    row_of, rows = _depths([record.depth for record in records if record.depth is not None])
    lengths = sorted({record.length for record in records})
    scores: defaultdict[tuple[str, float], defaultdict[tuple[int, int], list[float]]]
    scores = defaultdict(lambda: defaultdict(list))
    for record in records:
        assert record.depth is not None
        place = row_of(record.depth), lengths.index(record.length)
        scores[record.policy, record.budget][place].append(record.score)
    columns = ["own" if length == 0 else text.tokens(length) for length in lengths]

    def drawn(policy: str, budget: float, number: int) -> str:
        found = scores.get((policy, budget))
        if not found:
            return td(text.NOTHING)
        means = {place: sum(values) / len(values) for place, values in found.items()}
        title = f"{records[0].task}, {policy}, budget {text.share(budget)}"
        return f"<td>{charts.heat_map(f'{ident}-{number}', title, rows, columns, means)}</td>"

    budgets = [each for each in run.budgets if any(key[1] == each for key in scores)]
    lines, number = [], 0
    for name in [BASELINE, *run.policies]:
        asked = [1.0] if name == BASELINE else budgets
        if not any((name, budget) in scores for budget in asked):
            continue
        cells = [drawn(name, budget, number + index) for index, budget in enumerate(asked)]
        number += len(asked)
        if name == BASELINE:
            cells = [across(cells[0], len(budgets))]
        lines.append([run.label(name), *cells])
    headers = ["", *(f"{text.share(budget)}\nbudget" for budget in budgets)]
    headers += [""] * (not budgets)
    return table(f"Needle maps of {records[0].task}", headers, lines, "maps")


def _depths(depths: Sequence[float]) -> tuple[Any, list[str]]:
    """Which row a depth is in, and the rows' names; many depths are put into ten rows."""
    found = sorted(set(depths))
    if len(found) <= MOST_DEPTHS:
        return found.index, [f"{depth * 100:.3g} %" for depth in found]
    return (lambda depth: min(int(depth * 10), 9)), [
        f"{row * 10}–{row * 10 + 10}" for row in range(10)
    ]
