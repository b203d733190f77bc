"""What layer groups cost beside windowed layers: vLLM cuts all layers into tables of one width."""

from collections.abc import Iterator

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.sizing import block_tables


def count_tables(group_of_layer: list[int], num_windowed: int) -> int:
    """Block tables of a model, by the layer group of each full layer and its windowed layers."""
    windows = [max(group_of_layer) + 1] * num_windowed
    return sum(block_tables([*group_of_layer, *windows])[0])


def groups_warning(config: CompressionConfig, num_full: int, num_windowed: int) -> str | None:
    """What more than one layer group multiplies in a model with windowed layers; None: nothing."""
    groups = layer_groups(num_full, config.layer_groups)
    if not num_windowed or max(groups) == 0:
        return None
    many, one = count_tables(groups, num_windowed), count_tables([0] * num_full, num_windowed)
    if many <= one:
        return None
    return (
        f"layer_groups: {max(groups) + 1} layer groups beside {num_windowed} windowed layers make "
        f"{many} block tables where one group makes {one}, for vLLM cuts all layers into tables as "
        "narrow as the smallest group; every step prepares each of them. Set layer_groups.count to "
        "1 if the policy does without groups."
    )


def plan_warnings(config: CompressionConfig, geometry: ModelGeometry) -> Iterator[str]:
    """What ``kvcompress plan`` says of a model with windowed layers."""
    if geometry.num_windowed:
        yield (
            f"{geometry.num_windowed} further layers keep the last {geometry.window} tokens by "
            "themselves; they are left alone, and not counted here."
        )
    if warning := groups_warning(config, geometry.num_layers, geometry.num_windowed):
        yield warning
