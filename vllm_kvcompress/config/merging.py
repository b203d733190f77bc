"""Lays one setting's fields over another's: overrides over a preset, a task's over the rest."""

from collections.abc import Mapping
from typing import Any

EXCLUSIVE_FIELDS = {
    "budget": {"ratio", "tokens"},
    "layer_groups": {"count", "size"},
    "codebook": {"shallow", "groups"},
}
"""Fields of which only one may be set; setting one by an override drops the other."""


def merge_fields(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Overlay plain fields on others. Setting one of two exclusive fields drops the other."""
    merged = dict(base)
    if merged.get("mode") == "draft" and override.get("mode", "draft") != "draft":
        merged.pop("draft", None)  # how to draft means nothing any more
    for key, value in override.items():
        known = merged.get(key)
        if not (isinstance(value, Mapping) and isinstance(known, Mapping)):
            merged[key] = value
            continue
        known = dict(known)
        if value.get("name", known.get("name")) != known.get("name"):
            # Another policy: the old one's parameters, and what tasks do to it, mean nothing.
            known = {}
            if key == "policy" and "tasks" not in override:
                merged.pop("tasks", None)
                if "task" not in override:
                    merged.pop("task", None)
        if key == "layer_budget" and value.get("shape", known.get("shape")) != known.get("shape"):
            known = {}  # likewise
        if EXCLUSIVE_FIELDS.get(key, set()) & value.keys():
            known = {k: v for k, v in known.items() if k not in EXCLUSIVE_FIELDS[key]}
        merged[key] = merge_fields(known, value)
    return merged
