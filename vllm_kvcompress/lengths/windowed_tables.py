"""What layer groups cost beside layers of other kinds: vLLM cuts all into tables of one width."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.geometry import ModelGeometry
from vllm_kvcompress.lengths.layer_words import STATE, WINDOWED
from vllm_kvcompress.lengths.sizing import block_tables


@dataclass(frozen=True)
class LayersBeside:
    """Layers that compression leaves alone and vLLM gives block tables of their own.

    Attributes
    ----------
    windowed, recurrent : int
        Number of layers that attend to a window, and of layers with a state of fixed size (Mamba,
        linear attention, short convolution). Layers without either have no table and do not count.
    """

    windowed: int = 0
    recurrent: int = 0

    @classmethod
    def among(cls, types: Sequence[str]) -> "LayersBeside":
        """Count the words of `layer_kinds.layer_types`."""
        return cls(types.count(WINDOWED), types.count(STATE))

    def __str__(self) -> str:
        words = {"windowed layers": self.windowed, "recurrent layers": self.recurrent}
        return " and ".join(f"{count} {name}" for name, count in words.items() if count)


def count_tables(group_of_layer: list[int], beside: LayersBeside) -> int:
    """Block tables of a model, by the layer group of each full layer and the layers beside."""
    every = list(group_of_layer)
    for count in (beside.windowed, beside.recurrent):
        every += [max(every) + 1] * count
    return sum(block_tables(every)[0])


def groups_warning(config: CompressionConfig, num_full: int, beside: LayersBeside) -> str | None:
    """What more than one layer group multiplies beside layers of other kinds; None: nothing."""
    groups = layer_groups(num_full, config.layer_groups)
    if beside == LayersBeside() or max(groups) == 0:
        return None
    many, one = count_tables(groups, beside), count_tables([0] * num_full, beside)
    if many <= one:
        return None
    return (
        f"layer_groups: {max(groups) + 1} layer groups beside {beside} make "
        f"{many} block tables where one group makes {one}, for vLLM cuts all layers into tables as "
        "narrow as the smallest group; every step prepares each of them. Set layer_groups.count to "
        "1 if the policy does without groups."
    )


def plan_warnings(config: CompressionConfig, geometry: ModelGeometry) -> Iterator[str]:
    """What ``kvcompress plan`` says of a setting's layer groups beside layers of other kinds."""
    beside = LayersBeside(geometry.num_windowed, geometry.num_recurrent)
    if warning := groups_warning(config, geometry.num_layers, beside):
        yield warning
