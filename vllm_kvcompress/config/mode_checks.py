"""What of a setting does not go with a mode, a codebook or a trigger: one sentence per reason."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvcompress.config.settings import CompressionConfig


def compresses_once(config: "CompressionConfig") -> bool:
    """Whether what the end of a prompt leaves stays as it is, and is all that is read."""
    return not (config.compresses_while_decoding or config.drafts or config.codebook)


def check_drafts(config: "CompressionConfig") -> None:
    """Refuse fields that do not go with drafting, or do nothing without it.

    Raises
    ------
    ValueError
        With the field and what is allowed.
    """
    draft = config.draft
    if config.mode == "draft" and draft.budget is not None:
        raise ValueError('draft.budget: in the mode "draft" set budget, which is the view\'s')
    if not config.drafts:
        given = [name for name in draft.model_fields_set if getattr(draft, name) is not None]
        for name in sorted(given):
            flag = " (--kv-draft-tokens)" if name == "tokens" else ""
            raise ValueError(
                f"draft.{name}{flag}: nothing is drafted in the mode evict; set mode to draft "
                "(--kv-compression-mode draft), or set draft.budget"
            )
        return
    if config.codebook is not None:
        raise ValueError(
            "codebook: no draft is made over one; set mode evict without draft.budget, or "
            "leave out codebook"
        )
    if config.mode == "evict" and draft.refreshes:
        raise ValueError(
            "draft.refresh_every, draft.refresh_below: a cache that evicts has nothing to "
            "refresh a view from"
        )
    if draft.tokens == 0:
        raise ValueError("draft.tokens: draft at least one token per step")
    if config.mode == "draft" and config.compresses_in_prompts:
        raise ValueError("trigger: the mode draft keeps the whole cache; set end_of_prompt")
    if config.compresses_while_decoding:
        raise ValueError("trigger: views to draft over are taken at the end of the prompt")


def check_codebook(config: "CompressionConfig") -> None:
    """Refuse triggers with which no codebook can be made.

    Raises
    ------
    ValueError
        With what to set.
    """
    if config.codebook is None:
        return
    if not config.compresses_prompts or config.waits_for_pressure:
        raise ValueError("codebook: books are made when prompts end; set trigger end_of_prompt")
    if config.compresses_in_prompts:
        raise ValueError(
            "codebook: keys are coded by their positions, which a compaction inside the prompt "
            "loses; set trigger end_of_prompt, or leave codebook out"
        )


def check_shared_blocks(config: "CompressionConfig") -> None:
    """Refuse compactions at their marks where there are none, or where load decides on them.

    Raises
    ------
    ValueError
        With what to set.
    """
    if config.shared_blocks != "always":
        return
    if config.waits_for_pressure:
        raise ValueError(
            "shared_blocks: with the trigger pressure the load decides who is compressed, so "
            "nothing happens always; set another trigger, or leave shared_blocks out"
        )
    if config.mode == "draft":
        raise ValueError(
            "shared_blocks: the mode draft gives no blocks back; leave shared_blocks out, or set "
            "mode evict"
        )
