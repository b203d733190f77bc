"""A server's OpenAPI document, and what schemathesis makes of it.

As it is, the document lets fuzzers send other models' names and requests without a prompt: nearly
all are refused before anything of ours is asked. So it is also narrowed: to the served model, a
prompt, and per-request options under their own names, some of them right.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lab.errors import RunError
from vllm_kvcompress.config.reading import NONE, preset_names

GENERATE = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
    "/v1/messages",
    "/v1/systemone",
    "/generative_scoring",
)
"""Paths that generate tokens; others of the document have no business with the plugin."""

NO_MODEL = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""Paths that answer without the engine; sent for the server's sake."""

_NUMBER = {"type": "number"}
OPTIONS: dict[str, dict[str, Any]] = {
    "kv_compression": {"type": "string", "enum": [NONE, *preset_names(), "../x", "x\n"]},
    "kv_budget_ratio": {**_NUMBER, "minimum": -0.5, "maximum": 1.5},
    "kv_budget_tokens": {"type": "integer", "minimum": -1, "maximum": 4096},
    "kv_pin": {"type": "array", "items": {"type": "integer", "minimum": -1}, "maxItems": 6},
    "kv_task": {"type": "string", "enum": ["auto", "localization", "aggregation", "qa"]},
    "kv_draft_tokens": {"type": "integer", "minimum": 0, "maximum": 4},
    "kv_session": {"type": "string", "maxLength": 140},
    "kv_shared_prefix": {"type": "integer", "minimum": 0, "maximum": 4096},
}
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 60, "One, two", "\u202e\x1b[2J\n\0"]
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 2,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "enum": ["user"]},
            "content": {"type": "string", "enum": TEXTS},
        },
        "additionalProperties": False,
    },
}
PROMPT = {"type": "string", "enum": TEXTS}
OTHERS: dict[str, dict[str, Any]] = {
    "prompt": PROMPT,
    "messages": MESSAGES,
    "input": PROMPT,
    "stream": {"type": "boolean"},
    "n": {"type": "integer", "minimum": 0, "maximum": 3},
    "max_tokens": {"type": "integer", "minimum": -1, "maximum": 9},
    "temperature": {**_NUMBER, "minimum": -0.1, "maximum": 2.1},
}
"""Fields that bodies of the narrowed document keep, beside the options and the model."""


class Sent(NamedTuple):
    """One request.

    Attributes
    ----------
    label : str
        Path, and which document it was made from.
    request : dict
        Arguments of ``httpx.Client.request``.
    """

    label: str
    request: dict[str, Any]


def narrowed(document: dict[str, Any], model: str) -> dict[str, Any]:
    """The document with the served model, a prompt and our options where bodies take them."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        fields = schema.get("properties", {})
        if "vllm_xargs" not in fields:
            continue
        fields["vllm_xargs"] = {
            "type": "object",
            "properties": OPTIONS,
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 3,
        }
        fields["model"] = {"type": "string", "enum": [model]}
        fields.update({name: OTHERS[name] for name in OTHERS if name in fields})
        prompts = {"prompt", "messages", "input"} & fields.keys()
        schema["required"] = sorted({*schema.get("required", ()), "model", "vllm_xargs", *prompts})
        # The whole document has the others.
        kept = {*schema["required"], *OTHERS}
        schema["properties"] = {name: fields[name] for name in fields if name in kept}
        schema["additionalProperties"] = False
    return document


def drawn(values: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """About `count` values of a strategy; the same for the same seed."""
    found: list[Any] = []

    def collect(value: Any) -> None:
        found.append(value)

    quiet = settings(
        max_examples=max(count, 1),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(quiet(given(values)(collect)))()
    return found


def requests_of(document: dict[str, Any], kind: str, count: int, number: int) -> Iterator[Sent]:
    """About `count` requests for every path that is looked at, half of them against the schema.

    Parameters
    ----------
    document : dict
        An OpenAPI document.
    kind : str
        How to call it.
    count : int
        Of each path.
    number : int
        Seed.
    """
    try:
        import schemathesis
    except ImportError:
        raise RunError("schemathesis is missing: pip install schemathesis.") from None
    modes = schemathesis.GenerationMode
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()
        wanted = GENERATE if kind == "narrowed" else (*GENERATE, *NO_MODEL)
        if operation.path not in wanted or operation.method.upper() != "POST":
            continue
        for mode in (modes.POSITIVE, modes.NEGATIVE):
            label = f"POST {operation.path} ({kind} document, {mode.value})"
            cases = operation.as_strategy(generation_mode=mode)
            yield from (Sent(label, _as_request(case)) for case in drawn(cases, count // 2, number))


def _as_request(case: Any) -> dict[str, Any]:
    body, headers = case.body, {"content-type": case.media_type or "application/json"}
    if not isinstance(body, bytes):
        try:
            body = json.dumps(body).encode()
        except (TypeError, ValueError):  # no body at all
            body = b""
    return {"method": "POST", "url": case.operation.path, "content": body, "headers": headers}
