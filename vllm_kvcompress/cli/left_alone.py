"""What `kvcompress plan` says of layers whose cache compression leaves alone."""

from collections.abc import Iterator

from vllm_kvcompress.lengths.geometry import ModelGeometry


def left_alone(geometry: ModelGeometry) -> Iterator[str]:
    """One sentence per kind of layer beside those that attend to everything."""
    if geometry.num_windowed:
        yield (
            f"{geometry.num_windowed} further layers keep the last {geometry.window} tokens by "
            "themselves; they are left alone, and not counted here."
        )
    if geometry.num_recurrent:
        yield (
            f"{geometry.num_recurrent} further layers have a recurrent state, which compression "
            "makes no smaller; they are left alone, and not counted here. vLLM makes a block at "
            "least as large as such a state: set --block-size to the attention block size that its "
            "log names."
        )
