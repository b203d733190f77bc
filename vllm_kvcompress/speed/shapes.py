"""Sizes of a decoder-only transformer that decide what a pass of it reads and computes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.lengths.geometry import DTYPE_BYTES, ConfigFile, ModelGeometry


@dataclass(frozen=True)
class ModelShape:
    """What the size of a decoder-only transformer with grouped queries depends on.

    Attributes
    ----------
    num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, vocab_size : int
        As in config.json; of one worker after `shard`.
    weight_bytes, cache_bytes : float
        Bytes per weight (and per activation), and per element of the cache.
    num_workers : int
        Tensor-parallel ranks the numbers are of one of.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    weight_bytes: float = 2
    cache_bytes: float = 2
    num_workers: int = 1

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], weight_bytes: float = 2, cache_bytes: float = 2
    ) -> "ModelShape":
        """Shape of a Hugging Face config of a Llama or Qwen3 model."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            weight_bytes=weight_bytes,
            cache_bytes=cache_bytes,
        )

    def shard(self, num_workers: int) -> "ModelShape":
        """One tensor-parallel rank's part: heads, columns of the MLP and vocabulary are split.

        Raises
        ------
        ConfigError
            If the heads cannot be split so.
        """
        low, high = sorted((self.num_kv_heads, num_workers))
        if self.num_heads % num_workers or high % low:
            raise ConfigError(
                f"--tensor-parallel-size {num_workers}: must divide the model's {self.num_heads} "
                f"attention heads, and divide its {self.num_kv_heads} KV heads or be a multiple "
                "of them."
            )
        return replace(
            self,
            intermediate_size=-(-self.intermediate_size // num_workers),
            num_heads=self.num_heads // num_workers,
            num_kv_heads=max(self.num_kv_heads // num_workers, 1),
            vocab_size=-(-self.vocab_size // num_workers),
            num_workers=num_workers,
        )

    @property
    def num_layer_weights(self) -> int:
        """Weights of all layers: projections and gated MLPs."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp)

    @property
    def num_head_weights(self) -> int:
        """Weights of the head at the end; the table of input embeddings is as large."""
        return self.vocab_size * self.hidden_size

    @property
    def num_step_weights(self) -> int:
        """Weights that a pass multiplies with.

        The table of input embeddings is looked up, a row per token, and not read.
        """
        return self.num_layer_weights + self.num_head_weights

    @property
    def pass_weight_bytes(self) -> float:
        """Bytes of weights that one pass reads."""
        return self.num_step_weights * self.weight_bytes

    @property
    def resident_bytes(self) -> float:
        """Bytes of weights in memory: those of a pass, and the input embeddings."""
        return self.pass_weight_bytes + self.num_head_weights * self.weight_bytes

    @property
    def kv_layer_bytes(self) -> float:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.cache_bytes

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return self.num_layers * self.kv_layer_bytes

    @property
    def attention_flops(self) -> int:
        """FLOPs of one query token against one key and value, in all layers and heads."""
        return 4 * self.num_layers * self.num_heads * self.head_dim

    def link_bytes(self, num_tokens: float) -> float:
        """Bytes that a rank sends to sum activations, twice a layer, over a ring of ranks.

        A ring sends 2 (N - 1) / N times what it sums. 0 with one rank.
        """
        share = 2 * (self.num_workers - 1) / self.num_workers
        return 2 * self.num_layers * num_tokens * self.hidden_size * self.weight_bytes * share


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_shape(config: ConfigFile, geometry: ModelGeometry) -> ModelShape:
    """Shape of a model whose cache is known.

    Raises
    ------
    ConfigError
        If a field is missing or wrong.
    UnsupportedModelError
        If its weights are no Llama-like layers, or its cache has numbers of other sizes than them.
    """
    if any(config.text.get(name) for name in _EXPERTS):
        raise UnsupportedModelError(
            f"--speed: {config.path} describes a mixture of experts, and the time of its MLPs is "
            "not modelled: leave out --speed."
        )
    if geometry.num_recurrent:
        raise UnsupportedModelError(
            f"--speed: {config.path} describes recurrent layers, whose time is not modelled: leave "
            "out --speed."
        )
    if geometry.is_latent:
        raise UnsupportedModelError(
            f"--speed: {config.path} describes latent attention (MLA), whose time is not "
            "modelled: leave out --speed."
        )
    size = DTYPE_BYTES[geometry.dtype]
    if geometry.cache_bytes != size:
        raise UnsupportedModelError(
            f"--speed: the time of kernels that read a cache of {geometry.cache_dtype} is not "
            "modelled: leave out --speed or --kv-cache-dtype."
        )
    return ModelShape(
        num_layers=geometry.num_layers,
        hidden_size=config.whole_number("hidden_size"),
        intermediate_size=config.whole_number("intermediate_size"),
        num_heads=config.whole_number("num_attention_heads"),
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        vocab_size=config.whole_number("vocab_size"),
        weight_bytes=size,
        cache_bytes=size,
    )
