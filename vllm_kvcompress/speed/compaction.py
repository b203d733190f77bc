"""Work of one request's compaction: keeping queries, scoring, selecting, copying.

One request at a time: a step computes a few thousand tokens, so long prompts end one after the
other. Launches are counted as ``worker/compaction/compactor.py`` makes them on a GPU, and held
against a real `Compactor` by ``tests/worker/test_speed_launches.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import layer_groups, score_leaders
from vllm_kvcompress.lengths.sizing import GroupUsage, RequestUsage
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.speed import kernel_bytes
from vllm_kvcompress.speed.kernel_bytes import Heads, Launch
from vllm_kvcompress.speed.passes import CHUNK_TOKENS
from vllm_kvcompress.speed.paths import Path, Stage
from vllm_kvcompress.speed.scoring import Probe
from vllm_kvcompress.speed.shapes import ModelShape

HOST_COPIES = 1
"""Of a compaction from the host: tables, lengths, forced tokens and addresses of all its layer
groups together (``worker/batch.py``)."""

CHECK_LAUNCHES = 6
"""Of a step that compacts, to tell whether its scores are numbers: four operations on flags, a copy
from the host and one to it (``worker/compaction/faults.py``). Beside them a maximum over each layer
group's scores, two to bring several groups together, and a sum over several ranks."""


@dataclass(frozen=True)
class Compaction:
    """What the plugin adds to one request.

    Attributes
    ----------
    capture : Path
        While the prompt runs: keeping queries, or folding them.
    run : Path
        Behind the step that triggers it: "score", "policy", "select", "copy" and, with codebooks,
        "books". Empty where nothing is compacted.
    """

    capture: Path
    run: Path

    @property
    def path(self) -> Path:
        """All of it."""
        return Path.of([self.capture, self.run])


@dataclass(frozen=True)
class _Group:
    """A layer group that is compacted, in tokens; see `GroupLengths`."""

    layers: int
    scored_layers: int
    num_tokens: int
    num_keep: int
    region_len: int
    num_survivors: int
    is_coded: bool


def heads_of(shape: ModelShape) -> Heads:
    """Heads of one layer."""
    return Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.cache_bytes)


def _stage(name: str, launches: Sequence[tuple[Launch, int]], copies: int = 0) -> Stage:
    """Launches, each so many times; and copies from the host."""
    return Stage(
        name,
        read=sum(each.read * count for each, count in launches),
        written=sum(each.written * count for each, count in launches),
        flops=sum(each.flops * count for each, count in launches),
        launches=copies + sum((each.kernels + each.operations) * n for each, n in launches),
    )


def _groups(
    config: CompressionConfig, usage: RequestUsage, block_size: int, shape: ModelShape
) -> list[_Group]:
    policy = config.build_policy()
    group_of_layer = layer_groups(shape.num_layers, config.layer_groups)
    scores = [True] * shape.num_layers
    if policy.shares_scores:
        leaders = score_leaders(group_of_layer, policy.layers_per_ranking)
        scores = [leader == layer for layer, leader in enumerate(leaders)]
    found = []
    for group in usage.groups:
        if _is_left_alone(group):
            continue
        behind = group.tokens_before % block_size
        layers = range(group.first_layer, group.first_layer + group.num_layers)
        found.append(
            _Group(
                layers=group.num_layers,
                scored_layers=sum(scores[layer] for layer in layers),
                num_tokens=group.tokens_before,
                num_keep=group.tokens_attended,
                region_len=group.tokens_before - behind,
                num_survivors=group.tokens_attended - behind,
                is_coded=group.tokens_attended != group.tokens_after,
            )
        )
    return found


def _is_left_alone(group: GroupUsage) -> bool:
    return group.tokens_after == group.tokens_before


def compaction(
    shape: ModelShape,
    config: CompressionConfig,
    usage: RequestUsage,
    prompt_len: int,
    block_size: int,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Compaction:
    """Work of a request's first compaction on one worker.

    Parameters
    ----------
    shape : ModelShape
        The worker's part of the model.
    config : CompressionConfig
        The request's setting.
    usage : RequestUsage
        From `request_usage` of the same setting.
    prompt_len, block_size, chunk_tokens : int
        Tokens of the prompt, per block, and of a prompt per step.

    Raises
    ------
    ConfigError
        If the policy cannot be counted: see `Probe`.
    """
    groups = _groups(config, usage, block_size, shape)
    if not groups:
        return Compaction(Path(()), Path(()))
    decoding = usage.compacted_at != prompt_len
    probe = Probe(
        config.build_policy(), heads_of(shape), shape.hidden_size, config.observation_window,
        config.num_sink_tokens, shape.num_workers, chunk_tokens,
    )  # fmt: skip
    run = [*_scoring(probe, groups, decoding), _selecting(shape, groups)]
    run.append(_copying(shape, groups, probe.policy.rerotates_keys))
    if any(group.is_coded for group in groups):
        run.append(_books(shape, groups))
    captured = () if decoding else _capture(probe, shape, prompt_len, chunk_tokens)
    return Compaction(Path(captured), Path(tuple(run)))


def _capture(
    probe: Probe, shape: ModelShape, prompt_len: int, chunk_tokens: int
) -> tuple[Stage, ...]:
    """Keeping the window's queries in one step, or folding all queries chunk by chunk."""
    if probe.policy.queries is Queries.WINDOW:
        chunk = min(prompt_len, chunk_tokens)
        kept = kernel_bytes.store_rows(probe.heads, chunk, probe.observation_window)
        return (_stage("queries", [(kept, shape.num_layers)], copies=1),)
    if probe.policy.queries is Queries.PROMPT:
        folded = probe.fold(prompt_len)
        return (_stage("queries", [(each, shape.num_layers) for each in folded]),)
    return ()


def _scoring(probe: Probe, groups: Sequence[_Group], decoding: bool) -> tuple[Stage, Stage]:
    """Kernels that measure the cache, and what the policy makes of it."""
    costs = [(probe.score(g.num_tokens, g.num_keep, decoding), g.scored_layers) for g in groups]
    kernels = [(each, n) for cost, n in costs for each in cost.measurements.values()]
    return _stage("score", kernels), _stage("policy", [(cost.operations, n) for cost, n in costs])


def _selecting(shape: ModelShape, groups: Sequence[_Group]) -> Stage:
    """Scores of a group side by side, layer by layer; whether they are numbers; then the choice in
    all its layers."""
    heads, launches = heads_of(shape), []
    for group in groups:
        size = 4 * shape.num_kv_heads * group.layers * group.region_len
        launches.append((Launch(size, size, kernels=0, operations=group.layers), 1))
        launches.append((Launch(size, 0, kernels=0, operations=1), 1))  # is there a NaN?
        chosen = (group.layers, group.region_len, group.num_survivors)
        launches.append((kernel_bytes.select_tokens(heads, *chosen), 1))
    check = CHECK_LAUNCHES + 2 * (len(groups) > 1) + (shape.num_workers > 1)
    return _stage("select", launches, copies=HOST_COPIES + check)


def _copying(shape: ModelShape, groups: Sequence[_Group], rotates: bool) -> Stage:
    """Survivors to their blocks, all layers of a group at once."""
    plain = [group for group in groups if not group.is_coded]
    heads = heads_of(shape)
    launches = [(kernel_bytes.compact_pages(heads, g.layers, g.num_survivors), 1) for g in plain]
    # Where keys are turned, the positions that they are turned to are worked out first.
    launches += [(Launch(0, 0, kernels=0, operations=1), 1)] * (rotates * len(plain))
    return _stage("copy", launches)


def _books(shape: ModelShape, groups: Sequence[_Group]) -> Stage:
    """Codebooks: the kernels that build them, as if every layer were built alone.

    The tensor operations around them (`kernels/codebook/coded_tokens.py`) are left out, but
    for the copy of a layer's keys and values that they begin with.
    """
    heads, launches = heads_of(shape), []
    for group in groups:
        if group.is_coded:
            rows = group.region_len * 2 * heads.row
            launches.append((Launch(rows, rows, kernels=0, operations=1), group.layers))
            built = kernel_bytes.build_codebook(heads, group.num_survivors)
            launches += [(built, group.layers), (Launch(0, 0, kernels=built.kernels), group.layers)]
    return _stage("books", launches)
