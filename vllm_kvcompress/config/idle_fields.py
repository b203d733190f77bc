"""Refuses fields that a user wrote and that change nothing in the setting they are part of.

Only what was written last is looked at, and only a field that came without the one it needs: a
preset may bring an `interval` whose `trigger` the user changes, and who writes `trigger:
end_of_prompt` beside an `interval` knows.
"""

from collections.abc import Mapping
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import config_error


def refuse_idle(written: Mapping[str, Any], config: CompressionConfig, source: str) -> None:
    """Check the fields that were written last against the setting that came of them.

    Parameters
    ----------
    written : mapping
        Plain fields of the uppermost layer: of a file, or of what is laid over it. A value that is
        the default is let pass, because `kvcompress validate` prints them all.
    config : CompressionConfig
        The whole setting.
    source : str
        How to call its origin in messages.

    Raises
    ------
    ConfigError
        One sentence about the first such field.
    """
    variants = list(config.by_task.values()) or [config]
    defaults = {name: field.default for name, field in CompressionConfig.model_fields.items()}
    changed = {k for k, v in written.items() if v is not None and v != defaults.get(k)}
    if "task" in changed and not config.tasks:
        rule = "this setting does not depend on the task; set tasks too, or leave task out"
        raise config_error(source, "task", rule)
    counts = any(each.compresses_while_decoding or each.extends_codebooks for each in variants)
    if "interval" in changed and not written.keys() & {"trigger", "codebook"} and not counts:
        rule = "nothing is done at intervals; set trigger to interval or both, or leave it out"
        raise config_error(source, "interval", rule)
    ends = any(each.compresses_prompts for each in variants)
    if "min_prompt_len" in changed and "trigger" not in written and not ends:
        rule = "nothing is done when prompts end; set trigger to both, or leave it out"
        raise config_error(source, "min_prompt_len", rule)
    inside = any(each.compresses_in_prompts for each in variants)
    if "prompt_interval" in changed and "trigger" not in written and not inside:
        rule = "nothing is done inside prompts; set trigger to prompt or all, or leave it out"
        raise config_error(source, "prompt_interval", rule)
    waits = any(each.waits_for_pressure for each in variants)
    if "pressure" in changed and "trigger" not in written and not waits:
        rule = "nothing waits for memory to be scarce; set trigger to pressure, or leave it out"
        raise config_error(source, "pressure", rule)
    shape = config.layer_budget.shape
    alone = config.layer_groups.count == 1 and shape != "uniform"
    spread = (written.get("layer_budget") or {}).get("shape") is not None
    if spread and "layer_groups" not in written and alone:
        rule = (
            f"{shape} spreads the budget over layer groups, and there is one; set "
            "layer_groups.count to more, or layer_groups.size, or leave it out"
        )
        raise config_error(source, "layer_budget.shape", rule)
