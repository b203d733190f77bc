"""What ``kvcompress plan`` says of a cache whose type is not the model's."""

from collections.abc import Iterable

from vllm_kvcompress.config.cache_dtypes import check_eight_bits
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.lengths.geometry import DTYPE_BYTES, ModelGeometry


def check_cache(geometry: ModelGeometry, settings: Iterable[CompressionConfig]) -> None:
    """Refuse settings that the server would refuse with such a cache.

    Raises
    ------
    ConfigError
        With what to leave out.
    """
    if geometry.has_eight_bits:
        for each in settings:
            num_groups = max(layer_groups(geometry.num_layers, each.layer_groups)) + 1
            check_eight_bits(each, coded_groups(each.codebook, num_groups))


def kept_share(geometry: ModelGeometry, kept: float) -> str:
    """How much of the cache stays, of one in the model's type too where that is another size."""
    text, size = f"{kept:.1%} of the cache stays", DTYPE_BYTES[geometry.dtype]
    if geometry.cache_bytes == size:
        return text
    share = kept * geometry.cache_bytes / size
    return f"{text} ({share:.1%} of the bytes of a whole cache in {geometry.dtype})"
