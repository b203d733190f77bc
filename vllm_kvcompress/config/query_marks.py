"""What compression inside prompts means for a policy that reads queries."""

from vllm_kvcompress.config.settings import CompressionConfig


def marks_warning(config: CompressionConfig) -> str | None:
    """What a prompt loses whose question comes at its end; None where no queries are read.

    Numbers are in docs/long_prompts.md.
    """
    variants = config.by_task.values() if config.tasks else (config,)
    names = {
        each.policy.name
        for each in variants
        if each.compresses_in_prompts and each.build_policy().queries.value != "none"
    }
    if not names:
        return None
    return (
        f"trigger: inside prompts, {' and '.join(sorted(names))} keeps what the last tokens before "
        "each mark ask for. A question at the end of the prompt finds little of what lies before "
        f"its last {config.prompt_interval} tokens. The policy keydiff, which reads no queries, "
        "with half of the cache was the best that was measured."
    )
