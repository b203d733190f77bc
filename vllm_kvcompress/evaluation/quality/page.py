"""The page around the report: one HTML file with its own CSS and nothing from outside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_kvcompress.evaluation.quality.charts import HEAT_STEPS, NUM_COLORS
from vllm_kvcompress.evaluation.quality.text import escape

Rgb = tuple[int, int, int]

LIGHT_LINES = ("#0067a8", "#c24e00", "#00795a", "#a23f86", "#806400", "#45454d", "#0f8fbd")
DARK_LINES = ("#5ab0f2", "#ff8a4c", "#2fc79a", "#e58cc6", "#e0c341", "#d0d0d8", "#8be0ff")
"""After Okabe and Ito's palette for all kinds of colour vision, darkened and lightened until every
line has a contrast of 3:1 or more to its background (WCAG 2.1, 1.4.11)."""

LIGHT_HEAT = ((0xEA, 0xF0, 0xF4), (0xA6, 0x36, 0x03))
DARK_HEAT = ((0x26, 0x33, 0x3D), (0xFF, 0xA6, 0x5E))
"""Nothing lost, all lost. One ramp of lightness, so that it needs no hue to be read."""

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
 font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem}
h2{font-size:1.3rem;line-height:1.25;margin:3rem 0 .5rem;padding-top:.9rem;
 border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
p,ul{margin:.4rem 0 .9rem;max-width:78ch}
a{color:var(--link)}
.model{font-size:1.05rem;margin:0 0 .9rem}
.soft,.note{color:var(--soft)}
.note{font-size:.875rem}
.warn{border-left:4px solid var(--warn);padding:.35rem .8rem;background:var(--panel)}
nav{font-size:.9rem;margin:1rem 0}
nav a{display:inline-block;margin:0 1rem .3rem 0}
.box{overflow-x:auto;margin:.5rem 0 1rem;border:1px solid var(--rule);border-radius:6px;
 width:fit-content;max-width:100%;background:var(--panel)}
.box:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;line-height:1.35;
 font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.38rem .55rem;text-align:right;vertical-align:top;white-space:nowrap;
 border-bottom:1px solid var(--rule)}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child{text-align:left}
tbody th{font-weight:600;position:sticky;left:0;background:var(--panel)}
.name{display:inline-block;max-width:12rem;white-space:normal;overflow-wrap:break-word;
 vertical-align:top}
.words td,.words th{text-align:left}
.words td{white-space:normal;min-width:6rem}
.words td.long{min-width:16rem;max-width:34rem;overflow-wrap:anywhere}
td bdi{white-space:pre-wrap}
tr.base>*{border-bottom:2px solid var(--soft)}
tr.first>*{border-top:1px solid var(--soft)}
td b{font-size:1rem}
.words td b{font-size:inherit}
td span{color:var(--soft);font-size:.78rem}
td small,th small{display:block;color:var(--soft);font-weight:400;font-size:.78rem}
td.best{background:var(--best)}
td.left{text-align:left}
.words td.tight{white-space:nowrap}
.about{display:grid;grid-template-columns:minmax(7rem,max-content) minmax(0,1fr);
 gap:.2rem 1rem;font-size:.9rem;margin:.5rem 0 1rem}
.about dt{color:var(--soft)}
.about dd{margin:0}
pre{white-space:pre-wrap;background:var(--panel);border:1px solid var(--rule);border-radius:6px;
 padding:.6rem .8rem;font-size:.85rem}
code{font-size:.92em}
details{margin:.4rem 0}
summary{cursor:pointer;padding:.25rem 0}
.legend{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;border:1px solid var(--rule);
 border-radius:6px;padding:.45rem .8rem;margin:.6rem 0 1rem;background:var(--panel);
 font-size:.875rem;min-width:0}
.legend legend{color:var(--soft);font-size:.8rem;padding:0 .4rem}
.legend label{display:inline-flex;align-items:center;gap:.4rem;min-height:1.75rem}
.legend input{margin:0;accent-color:var(--link)}
.swatch{width:34px;height:12px;flex:none;vertical-align:middle}
.charts{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.1rem}
figcaption small{font-weight:400;color:var(--soft)}
.chart{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft)}
.heat{display:block}
.heat text{text-anchor:middle}
.heat text.tick{text-anchor:end}
.heat text.m{text-anchor:middle}
.grid{stroke:var(--rule);fill:none}
.whole{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:9 4;fill:none}
.wholeband{fill:var(--ink);opacity:.09}
.track{stroke:var(--c);stroke-width:1.8;fill:none;stroke-linejoin:round}
.bar{stroke:var(--c);stroke-width:1.1;fill:none;opacity:.5}
.many .bar{opacity:0}
.many .track{stroke-width:1.4}
.mark{fill:var(--c);stroke:var(--page);stroke-width:.8}
.chart:hover .line{opacity:.18}
.chart .line:hover{opacity:1}
.chart .line:hover .bar{opacity:.9}
.nothing{fill:none;stroke:var(--rule);stroke-dasharray:2 2}
.maps td,.maps th{padding:.45rem .6rem}
.maps thead th{text-align:center}
@media(min-width:900px){.legend.few{position:sticky;top:0;z-index:2}}
@media(max-width:520px){main{padding:18px 14px 48px}h1{font-size:1.4rem}h2{font-size:1.15rem}
 th,td{padding:.32rem .5rem}tbody th .swatch{display:block}.name{max-width:9.5rem}
 tbody th{font-size:.8rem}.about{grid-template-columns:1fr}.about dd{margin-bottom:.4rem}}
@media print{.legend input{display:none}.box{overflow:visible;border:0}}
"""


@dataclass(frozen=True)
class Section:
    """One part of the report.

    Attributes
    ----------
    ident : str
        Its anchor.
    title : str
        Its heading and its entry in the list of contents.
    body : str
        HTML.
    """

    ident: str
    title: str
    body: str


def document(title: str, head: str, sections: Iterable[Section], num_policies: int) -> str:
    """The whole page.

    Parameters
    ----------
    title : str
        For the browser's tab.
    head : str
        HTML above the list of contents.
    sections : iterable of Section
        In order.
    num_policies : int
        How many the legend can hide.
    """
    sections = list(sections)
    links = "".join(f'<a href="#{each.ident}">{escape(each.title)}</a>' for each in sections)
    parts = "".join(
        f'<section id="{each.ident}"><h2>{escape(each.title)}</h2>{each.body}</section>\n'
        for each in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing from outside and no scripts, whatever an answer of a model holds.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title>\n<style>{_themes()}{CSS}{_hiding(num_policies)}</style>"
        f'</head>\n<body><main>{head}<nav aria-label="Contents">{links}</nav>\n{parts}'
        "</main></body></html>\n"
    )


def table(
    caption: str,
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    kind: str = "",
    row_kinds: Sequence[str] = (),
) -> str:
    """A table in a box that scrolls sideways by itself.

    Parameters
    ----------
    caption : str
        What it holds, for screen readers.
    headers : sequence of str
        Plain text; "\\n" begins a second, smaller line.
    rows : iterable of sequence of str
        The first cell is HTML inside the row's heading, the others are whole ``<td>`` elements.
    kind : str
        CSS class.
    row_kinds : sequence of str
        CSS classes of rows, "" for none.
    """
    heads = "".join(f'<th scope="col">{_two_lines(header)}</th>' for header in headers)
    lines = []
    for index, (first, *others) in enumerate(rows):
        named = row_kinds[index] if index < len(row_kinds) else ""
        attribute = f' class="{named}"' if named else ""
        lines.append(f'<tr{attribute}><th scope="row">{first}</th>{"".join(others)}</tr>')
    return (
        f'<div class="box" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="{kind}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def td(
    text: str,
    small: Sequence[str] = (),
    kind: str = "",
    data: Mapping[str, object] | None = None,
    beside: str = "",
) -> str:
    """A cell of plain text.

    Parameters
    ----------
    text : str
        The main line.
    small : sequence of str
        Smaller lines below.
    kind : str
        CSS class.
    data : mapping, optional
        Of ``data-`` attributes.
    beside : str
        What stands smaller beside the main line, such as its interval.
    """
    attributes = f' class="{kind}"' if kind else ""
    attributes += "".join(
        f' data-{name}="{escape(str(value))}"' for name, value in (data or {}).items()
    )
    lines = "".join(f"<small>{escape(line)}</small>" for line in small)
    main = f"<b>{escape(text)}</b>" if small or beside else escape(text)
    main += f" <span>{escape(beside)}</span>" if beside else ""
    return f"<td{attributes}>{main}{lines}</td>"


def across(cell: str, columns: int) -> str:
    """A cell over several columns."""
    return cell.replace("<td", f'<td colspan="{columns}"', 1) if columns > 1 else cell


def quoted(text: str) -> str:
    """A cell with a model's or file's words; their direction of writing ends with the cell."""
    return f'<td class="long"><bdi>{escape(text)}</bdi></td>'


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def details(summary: str, body: str, is_open: bool = False) -> str:
    """HTML that can be folded away, under a line of plain text."""
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{body}</details>"
    )


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they stand for, both plain text."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="about">{rows}</dl>'


def _two_lines(header: str) -> str:
    first, _, second = header.partition("\n")
    return escape(first) + (f"<small>{escape(second)}</small>" if second else "")


def _hiding(num_policies: int) -> str:
    """Unticking a policy in the legend hides its lines, where the browser knows ``:has``."""
    return "".join(
        f"body:has(#show{index}:not(:checked)) .chart .k{index}{{display:none}}"
        for index in range(num_policies)
    )


# --- colours ------------------------------------------------------------------------------

_LIGHT = {
    "page": "#ffffff",
    "panel": "#f8f9fb",
    "ink": "#1b1f24",
    "soft": "#59636e",
    "rule": "#d9dee4",
    "link": "#0a5ca8",
    "warn": "#b35900",
    "best": "#e3eefb",
}
_DARK = {
    "page": "#14181d",
    "panel": "#1b2027",
    "ink": "#e8ebef",
    "soft": "#a0aab6",
    "rule": "#343c46",
    "link": "#7ab8ff",
    "warn": "#ffab5c",
    "best": "#23364d",
}


def _themes() -> str:
    light = _variables(_LIGHT, LIGHT_LINES, *LIGHT_HEAT)
    dark = _variables(_DARK, DARK_LINES, *DARK_HEAT)
    uses = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(NUM_COLORS))
    for step in range(HEAT_STEPS + 1):
        uses += f".h{step}{{fill:var(--h{step})}}svg .n{step}{{fill:var(--n{step})}}"
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{uses}"
    )


def _variables(named: dict[str, str], lines: Sequence[str], least: Rgb, most: Rgb) -> str:
    found = dict(named) | {f"c{index}": color for index, color in enumerate(lines)}
    for step in range(HEAT_STEPS + 1):
        part = step / HEAT_STEPS
        mixed = [round(a + (b - a) * part) for a, b in zip(least, most, strict=True)]
        found[f"h{step}"] = "#" + "".join(f"{value:02x}" for value in mixed)
        found[f"n{step}"] = "#15191e" if luminance(mixed) > 0.18 else "#ffffff"
    return "".join(f"--{name}:{color};" for name, color in found.items())


def luminance(color: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour of 0 to 255 (WCAG 2.1); 0.18 is as far from black as
    from white in contrast."""
    parts = [value / 255 for value in color]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
