"""`kvcompress doctor`: would a server start here with a model and a setting, and what is saved?

Importing this file imports neither torch nor vLLM.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.text import Text

from vllm_kvcompress.cli.common import make_console, say
from vllm_kvcompress.config.reading import NONE, preset_names
from vllm_kvcompress.doctor.findings import Finding, Question
from vllm_kvcompress.doctor.questions import examine
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.sizing import parse_size

_STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red"}


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def add_doctor_options(option: Callable[..., Any]) -> None:
    """Options of the command; `option` is a parser's ``add_argument``."""
    text = "folder of a model: would a server take it? Weights are not loaded"
    option("--model", metavar="DIR", type=Path, help=text)
    known = f"a setting: {', '.join(preset_names())}, or the path of a YAML file"
    option("--kv-compression", default=NONE, metavar="PRESET|FILE.yaml", help=known)
    option("--kv-compression-config", default="{}", metavar="JSON", help="fields laid over it")
    text = "memory for the cache on each worker, such as 40GiB: count the prompts that fit"
    option("--kv-cache-memory", metavar="SIZE", type=_size, help=text)
    option("--json", action="store_true", help="print it for programs")


def run_doctor(args: argparse.Namespace) -> int:
    """Look at everything and say what is wrong; 1 if anything fails."""
    question = Question(
        args.model, args.kv_compression, args.kv_compression_config, args.kv_cache_memory
    )
    found = examine(question)
    is_well = all(each.state != "fail" for each in found)
    if args.json:
        rows = [each._asdict() for each in found]
        say(json.dumps({"ok": is_well, "findings": rows}, indent=1))
    else:
        _print(found)
    return 0 if is_well else 1


def _print(found: list[Finding]) -> None:
    console = make_console()
    width = max(len(each.check) for each in found)
    for state, check, sentence in found:
        line = Text(f"{state:8}", _STYLES[state])
        line.append(f"{check:{width}}  ", "default")
        line.append(sentence, "default")
        console.print(line, soft_wrap=True)
    counts = {state: sum(each.state == state for each in found) for state in _STYLES}
    say(f"\n{counts['ok']} ok, {counts['warning']} warnings, {counts['fail']} failed.")
