"""The worker's own `Compactor`, run on a prompt of a replay."""

from typing import TYPE_CHECKING

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.replay_queries import PromptSummaries, WindowQueries
from vllm_kvcompress.evaluation.replay_rows import RememberedCodes, RowsOfPrompt
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import (
    compaction_lengths,
    forced_ranges,
    layer_groups,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupLengths, GroupPlan
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.codebook.writer import CodebookWriter
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.replay import Prefilled, Replay


def due_lengths(
    replay: "Replay", prompt: "Prefilled", config: CompressionConfig
) -> list[GroupLengths | None]:
    """Lengths of the compaction that is due, by layer group."""
    length, held = len(prompt.token_ids), prompt.held
    if held is not None:
        return next_lengths(length, held.position, held.caches, config, replay.block_size)
    codes = codes_per_row(prompt.keys[0].shape[-1] * prompt.keys[0].element_size())
    groups = max(layer_groups(len(replay.full_layers), config.layer_groups)) + 1
    return compaction_lengths(length, config, groups, replay.block_size, codes)


def compact(
    replay: "Replay", prompt: "Prefilled", config: CompressionConfig, seed: int
) -> dict[int, tuple[RowsOfPrompt, int | None]]:
    """By layer, what was written, and the region's length; None: it is left alone.

    Windowed and recurrent layers are not among them.
    """
    num_layers, length = len(replay.full_layers), len(prompt.token_ids)
    group_of = layer_groups(num_layers, config.layer_groups)
    by_group = due_lengths(replay, prompt, config)
    whole = GroupCache(length, permanent_ranges(length, config))
    caches, position = (whole,) * len(by_group), length
    if prompt.held is not None:
        caches, position = prompt.held.caches, prompt.held.position
    layouts = [RowsOfPrompt(prompt, layer) for layer in replay.full_layers]
    compactor = Compactor(
        layers=[replay.layer_cache(place, layouts[place]) for place in range(num_layers)],
        num_layers=num_layers,
        sources=QuerySources(
            window=WindowQueries(prompt, config.observation_window),  # type: ignore[arg-type]
            prompt=PromptSummaries(prompt, config, replay),  # type: ignore[arg-type]
            ring=None,  # type: ignore[arg-type]
        ),
        device=replay.device,
        all_reduce=lambda tensor: tensor,
        num_ranks=1,
        first_kv_head=0,
    )
    CodebookWriter(None, None, RememberedCodes()).register(compactor)
    plans: list[GroupPlan | None] = []
    for lengths, cache in zip(by_group, caches, strict=True):
        forced = forced_ranges(cache, config.observation_window)
        plans.append(GroupPlan(lengths, cache, forced, (), (), ()) if lengths else None)
    groups = tuple(plans[group] for group in group_of)
    plan = CompactionPlan("replay", position, False, seed, groups)
    compactor.run([CompactionJob(plan, config, 0)])
    regions = [each.lengths.region_len if each else None for each in groups]
    return dict(zip(replay.full_layers, zip(layouts, regions, strict=True), strict=True))
