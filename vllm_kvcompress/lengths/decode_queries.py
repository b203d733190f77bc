"""How many queries are kept while requests decode: sizes of the ring that workers write.

Scheduler and workers compute the same numbers from the same configuration, so that the scheduler
can hand out the slots of a ring that it never sees.
"""

import math
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.layer_kinds import full_layers

RING_BYTES = 2**30
"""What the ring of one rank may take, unless `MIN_SLOTS` of it take more."""

MIN_SLOTS = 8
"""Requests that can always record at once, memory or not."""


def decode_window(config: CompressionConfig) -> int:
    """Queries per request that must be kept while decoding; 0 if none."""
    return max(_own_window(each) for each in _variants(config))


def decode_gap(config: CompressionConfig) -> int:
    """Fewest tokens from one compaction or view to the next that reads queries.

    0 where a view may be taken again at any length. Only for a setting with a `decode_window`.
    """
    return min(_own_gap(each) for each in _variants(config) if _own_window(each))


@dataclass(frozen=True)
class RingShape:
    """The ring of one rank.

    Attributes
    ----------
    window : int
        Queries that a compaction may ask for; 0 if there is no ring.
    slot_len : int
        Queries per slot: those of the window, and drafts of two steps. Drafts that come to nothing
        must not overwrite queries of the window.
    num_slots : int
        Requests that can record at once.
    """

    window: int
    slot_len: int
    num_slots: int


def ring_shape(vllm_config: Any, config: CompressionConfig) -> RingShape:
    """Size the ring from vLLM's configuration and the server's setting.

    A request needs a slot for the last `window` of the `decode_gap` tokens between compactions.
    There are twice as many slots as that share of `max_num_seqs`, because requests that start
    together fall due together, as far as `RING_BYTES` allow; never more than requests.
    """
    window = decode_window(config)
    if not window:
        return RingShape(0, 0, 0)
    num_drafts = vllm_config.num_speculative_tokens
    slot_len = window + (2 * (num_drafts + 1) if num_drafts else 0)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    share = max(
        _own_window(each) / max(_own_gap(each), _own_window(each))
        for each in _variants(config)
        if _own_window(each)
    )
    wanted = max(math.ceil(2 * max_num_seqs * share), MIN_SLOTS)
    fitting = max(RING_BYTES // (slot_len * query_bytes(vllm_config)), MIN_SLOTS)
    return RingShape(window, slot_len, min(max_num_seqs, wanted, fitting))


def query_bytes(vllm_config: Any) -> int:
    """Queries of one token in all layers that can be compacted, in bytes per rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_layers = len(full_layers(model.hf_text_config, model.max_model_len))
    text = model.hf_text_config
    # Queries of latent attention are kept as the heads have them, not as wide as a cached row.
    size = text.qk_nope_head_dim + text.qk_rope_head_dim if model.use_mla else model.get_head_size()
    per_layer = model.get_num_attention_heads(parallel) * size
    return num_layers * per_layer * model.dtype.itemsize


def _variants(config: CompressionConfig) -> list[CompressionConfig]:
    return list(config.by_task.values()) or [config]


def _own_window(config: CompressionConfig) -> int:
    reads = config.compresses_while_decoding or config.refreshes_views
    needs = reads and config.build_policy().queries.value != "none"
    return config.observation_window if needs else 0


def _own_gap(config: CompressionConfig) -> int:
    gaps = [config.interval] if config.compresses_while_decoding else []
    if config.refreshes_views:
        draft = config.draft
        gaps.append(0 if draft.refresh_below is not None else draft.refresh_every or 0)
    return min(gaps)
