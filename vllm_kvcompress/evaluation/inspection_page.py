"""An `Inspection` as one HTML file: no outside resources, complete without JavaScript.

What changes between layers and heads is drawn by a script of its own from bits that the page
carries; without the script the page shows the picture over all of them.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from vllm_kvcompress.evaluation.inspection import Inspection, Kept, LayerSet, binned, bins_of
from vllm_kvcompress.evaluation.quality.text import visible

NUM_LEVELS = 10
NUM_BINS = 80
MAX_BITS = 16_000_000
"""Most bits of the choice of a layer and head: 4 MB of the page."""


class PageTexts(NamedTuple):
    """What the page says beside the pictures.

    Attributes
    ----------
    title : str
        What was looked at.
    facts : list[tuple[str, str]]
        Names and values.
    setting : str
        The complete setting, as YAML.
    """

    title: str
    facts: list[tuple[str, str]]
    setting: str


class Cell(NamedTuple):
    """Neighbouring tokens that the same heads keep: their text, and the tokens [start, end)."""

    text: str
    start: int
    end: int
    is_needle: bool


def level(share: float) -> int:
    """Step of the heat scale, 0 to `NUM_LEVELS`: 0 and the last stand for none and all alone."""
    if share <= 0 or share >= 1:
        return NUM_LEVELS * (share >= 1)
    return min(max(round(share * NUM_LEVELS), 1), NUM_LEVELS - 1)


def cells(inspection: Inspection) -> list[Cell]:
    """The prompt in order."""
    kept = inspection.kept[inspection.layers].reshape(-1, inspection.kept.shape[2])
    changes = np.append(True, (kept[:, 1:] != kept[:, :-1]).any(axis=0))
    needle = set(inspection.prompt.needle or ())
    found: list[Cell] = []
    for text, start, end in inspection.prompt.pieces:
        same = not changes[start:end].any()
        inside = start in needle
        if found and same and found[-1].is_needle == inside:
            found[-1] = found[-1]._replace(text=found[-1].text + text, end=end)
        else:
            found.append(Cell(text, start, end, inside))
    return found


def render(inspection: Inspection, texts: PageTexts) -> str:
    """The whole page."""
    found = cells(inspection)
    kept = inspection.kept[inspection.layers]
    has_choice = kept.shape[0] * kept.shape[1] * len(found) <= MAX_BITS
    body = [
        f"<h1>{escape(texts.title)}</h1>",
        _facts(texts.facts),
        *(f'<p class="note">{escape(note[0].upper() + note[1:])}</p>' for note in inspection.notes),
        "<h2>Where the survivors are</h2>",
        _map(inspection),
        "<h2>The prompt</h2>",
        _legend(inspection),
        _chooser(inspection) if has_choice else "",
        f'<div id="text" class="text">{"".join(_spans(inspection, found))}</div>',
        "<h2>Layer groups</h2>",
        _table(inspection),
        _needle(inspection),
        _answers(inspection),
        f"<details><summary>The setting</summary><pre>{escape(texts.setting)}</pre></details>",
    ]
    if has_choice:
        body.append(f'<script type="application/json" id="kept">{_data(kept, found)}</script>')
        body.append(f"<script>{_SCRIPT}</script>")
    return _PAGE.format(title=escape(texts.title), style=_STYLE, body="\n".join(filter(None, body)))


# --- parts --------------------------------------------------------------------------------


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    rows = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
    return f"<dl>{''.join(rows)}</dl>"


def _spans(inspection: Inspection, found: Sequence[Cell]) -> Iterator[str]:
    shares = inspection.shares
    for text, start, end, is_needle in found:
        share = float(shares[start:end].mean())
        names = f"l{level(share)}" + " needle" * is_needle
        where = f"token {start}" if end == start + 1 else f"tokens {start} to {end - 1}"
        shown = escape(visible(text))
        yield f'<span class="{names}" title="{where}: {share:.0%}">{shown}</span>'


def _legend(inspection: Inspection) -> str:
    steps = "".join(f'<span class="l{each}">&nbsp;&nbsp;</span>' for each in range(NUM_LEVELS + 1))
    needle = (
        ' Underlined: the <span class="needle">needle</span>.' if inspection.prompt.needle else ""
    )
    heads = inspection.kept.shape[1]
    layers = inspection.layers
    if layers == inspection.full:
        which = f"all {len(layers)} layers x {heads} KV heads"
    else:
        which = f"layers {layer_numbers(layers)} x {heads} KV heads"
    return (
        f'<p class="legend">Share of <span id="which">{which}</span> that keep a token: '
        f"none {steps} all.{needle}</p>"
    )


def _chooser(inspection: Inspection) -> str:
    def options(name: str, numbers: Iterable[int]) -> str:
        each = (f'<option value="{i}">{number}</option>' for i, number in enumerate(numbers))
        return (
            f'<label>{name} <select id="{name.lower()}"><option value="">all</option>'
            f"{''.join(each)}</select></label>"
        )

    both = options("Layer", inspection.layers), options("Head", range(inspection.kept.shape[1]))
    # Shown by the script: without it, it would do nothing.
    return f'<p id="chooser" hidden>{" ".join(both)}</p>'


def _map(inspection: Inspection) -> str:
    """One row of rectangles per shown layer, the prompt from left to right."""
    length = inspection.kept.shape[2]
    bins = min(NUM_BINS, length)
    size, label = 10, 34
    rows = []
    for row, layer in enumerate(inspection.layers):
        heads = inspection.kept[layer].mean(axis=0)
        levels = [level(share) for share in binned(heads, bins)]
        y = row * size
        minor = "" if row % 4 == 0 else ' class="minor"'
        rows.append(f'<text{minor} x="{label - 5}" y="{y + size - 2}">{layer}</text>')
        for start, end in _runs(levels):
            x, width = label + start * size, (end - start) * size
            rows.append(
                f'<rect class="l{levels[start]}" x="{x}" y="{y}" width="{width}" height="{size}"/>'
            )
    bottom = len(inspection.layers) * size
    for place in sorted(set(bins_of(length, bins)[inspection.prompt.needle or []].tolist())):
        x = label + size * (place + 0.5)
        rows.append(f'<circle cx="{x}" cy="{bottom + 5}" r="3"/>')
    marks = " Dots below: the needle." if inspection.prompt.needle else ""
    return (
        f'<p class="legend">One row per layer, the prompt\'s {length:,} tokens from left to right; '
        f"the stronger the colour, the more heads keep them.{marks}</p>"
        f'<svg viewBox="0 0 {label + bins * size} {bottom + 10}" role="img" '
        f'aria-label="Share of tokens kept by layer and position">{"".join(rows)}'
        "</svg>"
    )


def _runs(levels: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for index in range(1, len(levels) + 1):
        if index == len(levels) or levels[index] != levels[start]:
            yield start, index
            start = index


def _table(inspection: Inspection) -> str:
    titles = ["group", "layers", "tokens kept", "of the prompt", "chosen by"]
    if inspection.prompt.needle:
        titles += ["needle kept, least", "mean", "most"]
    head = "".join(f"<th>{each}</th>" for each in titles)
    rows = "".join(f"<tr>{_row(inspection, each)}</tr>" for each in inspection.rows())
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _row(inspection: Inspection, row: LayerSet) -> str:
    kept = inspection.kept[row.layers].sum(axis=2)
    chosen = "each layer" if row.leader is None else f"layer {row.leader}"
    values = [
        str(row.group),
        layer_numbers(row.layers),
        f"{kept.mean():,.0f}" + " (codebook)" * row.is_coded,
        f"{kept.mean() / inspection.kept.shape[2]:.1%}",
        chosen,
    ]
    needle = inspection.needle_shares()
    if needle is not None:
        part = needle[row.layers]
        values += [f"{each:.0%}" for each in (part.min(), part.mean(), part.max())]
    return "".join(f"<td>{value}</td>" for value in values)


def _needle(inspection: Inspection) -> str:
    shares = inspection.needle_shares()
    if shares is None:
        return ""
    head = "".join(f"<th>{each}</th>" for each in range(shares.shape[1]))
    rows = []
    for layer in inspection.layers:
        row = "".join(f'<td class="l{level(each)}">{each:.0%}</td>' for each in shares[layer])
        rows.append(f"<tr><th>{layer}</th>{row}</tr>")
    return (
        "<h2>The needle, by layer and head</h2>"
        f"<p>{len(inspection.prompt.needle or ())} tokens.</p>"
        f'<div class="wide"><table><tr><th>layer \\ head</th>{head}</tr>{"".join(rows)}'
        "</table></div>"
    )


def _answers(inspection: Inspection) -> str:
    answers = inspection.answers
    if answers is None:
        return ""
    both = (("Over the whole cache", answers.whole), ("Over the survivors", answers.compressed))
    boxes = (
        f"<section><h3>{title}</h3><pre>{escape(visible(text))}</pre></section>"
        for title, text in both
    )
    return (
        f"<h2>Answers</h2><p>The first {answers.num_equal} of {answers.num_tokens} tokens are the "
        f'same.</p><div class="pair">{"".join(boxes)}</div>'
    )


def layer_numbers(layers: Sequence[int]) -> str:
    """Neighbours as ranges, such as 0-4, 7."""
    steps = [layer - index for index, layer in enumerate(layers)]
    runs = [(layers[start], layers[end - 1]) for start, end in _runs(steps)]
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _data(kept: Kept, found: Sequence[Cell]) -> str:
    """Per layer and head the cells it keeps, four of them in a hexadecimal digit."""
    starts = [each.start for each in found]
    packed = np.packbits(kept[:, :, starts], axis=2)
    return json.dumps([[row.tobytes().hex() for row in layer] for layer in packed])


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_COLOURS = "".join(
    f".l{step} {{ background: rgb(var(--heat) / {step * 7}%); fill: rgb(var(--heat) / {step * 10}%)"
    f"; color: var(--{'ink' if step else 'faint'}) }}\n"
    for step in range(NUM_LEVELS + 1)
)
_STYLE = (
    """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --faint: #6a6a6a;
  --line: #d5d5d5; --box: #f7f7f7; --heat: 235 120 20; --mark: #0b57d0 }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #f1f1f1;
  --faint: #9a9da3; --line: #3a3d42; --box: #1e2125; --heat: 225 105 15; --mark: #8ab4f8 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 16px }
h1 { font-size: 22px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 28px 0 8px }
h3 { font-size: 15px; margin: 0 0 4px }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr));
  gap: 8px 20px; margin: 0 }
dt { color: var(--faint); font-size: 13px }
dd { margin: 0; overflow-wrap: anywhere }
.note { border-left: 3px solid var(--mark); padding-left: 10px }
.legend { color: var(--faint); margin: 4px 0 8px }
.legend span[class^=l] { outline: 1px solid var(--line) }
svg { display: block; width: 100%; height: auto; background: var(--box) }
svg text { font-size: 9px; fill: var(--faint); text-anchor: end }
svg rect { shape-rendering: crispEdges }
@media (max-width: 700px) { svg text { font-size: 18px } svg text.minor { display: none } }
svg circle { fill: var(--mark) }
.text, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 12px;
  background: var(--box); border: 1px solid var(--line); border-radius: 6px;
  font: 14px/1.65 ui-monospace, "DejaVu Sans Mono", monospace }
.text { max-height: 75vh; overflow-y: auto }
.needle { text-decoration: underline 2px var(--mark); text-underline-offset: 3px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 12px; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap }
th { color: var(--faint); font-weight: 500 }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr));
  gap: 16px }
select { font: inherit; margin-right: 12px }
details { margin-top: 28px }
"""
    + _COLOURS
)
_SCRIPT = """
"use strict";
const kept = JSON.parse(document.getElementById("kept").textContent);
const cells = [...document.querySelectorAll("#text > span")];
const first = cells.map(cell => [cell.className, cell.title]);
const which = document.getElementById("which"), overall = which.textContent;
const layer = document.getElementById("layer"), head = document.getElementById("head");
function keeps(row, cell) {
  return parseInt(row[cell >> 2], 16) >> (3 - (cell & 3)) & 1;
}
function name(list) {
  return list.selectedOptions[0].textContent;
}
function draw() {
  const all = !layer.value && !head.value;
  const layers = layer.value ? [kept[layer.value]] : kept;
  const rows = layers.flatMap(each => head.value ? [each[head.value]] : each);
  which.textContent = all ? overall : (layer.value ? "layer " + name(layer) : "all layers shown")
    + (head.value ? ", head " + name(head) : ", all heads");
  cells.forEach((cell, index) => {
    let [kind, title] = first[index];
    if (!all) {
      const count = rows.reduce((sum, row) => sum + keeps(row, index), 0);
      const share = count / rows.length, most = MOST;
      const step = share > 0 && share < 1
        ? Math.min(Math.max(Math.round(share * most), 1), most - 1) : share * most;
      kind = kind.replace(/^l\\d+/, "l" + step);
      title = title.replace(/: .*/, ": " + Math.round(share * 100) + "%");
    }
    cell.className = kind;
    cell.title = title;
  });
}
layer.onchange = head.onchange = draw;
document.getElementById("chooser").hidden = false;
""".replace("MOST", str(NUM_LEVELS))
