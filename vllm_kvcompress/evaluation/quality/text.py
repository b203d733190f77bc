"""Numbers and names as the report shows them, and their escape into HTML."""

import html
import json
import math
from collections.abc import Iterable
from typing import Any

from vllm_kvcompress.evaluation.quality.intervals import Interval

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_PICTURES |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
# These turn the direction of what follows them.
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def visible(text: str) -> str:
    """Text whose control characters are pictures of themselves: nothing acts on its reader."""
    return text.translate(_PICTURES)


def escape(text: str) -> str:
    """Text for HTML. Control characters, which HTML does not allow, become visible signs."""
    text = visible(text.replace("\r\n", "\n"))
    # Half a surrogate pair cannot be written as UTF-8.
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return html.escape(text)


def percent(value: float) -> str:
    """A score of 0 to 1 as people say it: "84.2"."""
    return f"{value * 100:.1f}"


def percent_interval(interval: Interval) -> str:
    """Bounds of a score."""
    return f"[{percent(interval.low)}, {percent(interval.high)}]"


def signed(value: float) -> str:
    """A difference of scores, with its sign."""
    shown = percent(abs(value))
    if shown == "0.0":
        return shown
    return ("+" if value > 0 else MINUS) + shown


def signed_interval(interval: Interval) -> str:
    """Bounds of a difference."""
    return f"[{signed(interval.low)}, {signed(interval.high)}]"


def share(value: float | None) -> str:
    """A share in percent with up to three digits: "12.5 %"."""
    if value is None:
        return NOTHING
    return f"{value * 100:.3g}\N{NO-BREAK SPACE}%" if value < 9.995 else f"{value * 100:,.0f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A plain number; a dash where there is none."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "infinite" if value > 0 else "not a number"
    return f"{value:,.{digits}f}"


def perplexity(nll: float | None) -> str:
    """exp of nats per token."""
    if nll is None:
        return NOTHING
    return number(math.exp(min(nll, 700.0)) if nll == nll else nll)


def tokens(length: int | None) -> str:
    """A length: "4K", "3,000"; 0 is a task's own."""
    if not length:
        return "own length" if length == 0 else "all"
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"


def counted(count: int, what: str, plural: str = "") -> str:
    """ "1 sample", "3 samples"."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"


def shortened(text: str, most: int) -> str:
    """At most so many characters, with what is left out."""
    if len(text) <= most:
        return text
    return f"{text[:most]} … ({counted(len(text) - most, 'more character')})"


def said(value: Any) -> str:
    """A value of run.json in one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not any(isinstance(each, dict | list) for each in value):
        return ", ".join(said(each) for each in value)
    if isinstance(value, dict) and not any(isinstance(v, dict | list) for v in value.values()):
        return ", ".join(f"{name} {said(each)}" for name, each in value.items())
    return json.dumps(value, ensure_ascii=False)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Names in one line, the last ones counted only."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
