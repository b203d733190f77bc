"""StreamingLLM: attention sinks and the most recent tokens."""

import torch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ScoreInputs


class StreamingLLM(Policy):
    """StreamingLLM: keep the first tokens and the most recent ones.

    The sinks are `num_sink_tokens` of the configuration. (arXiv 2309.17453)

    Attributes
    ----------
    rerotate_keys : bool, default False
        Whether surviving keys are turned to neighbouring positions that end where the uncompressed
        tail begins, closing the gap behind the sinks. The paper numbers the tokens of its cache
        from 0 instead; with a relative embedding such as RoPE only distances count, and those are
        the same. It matters past the model's trained length. Otherwise keys stay where they were.
    """

    rerotate_keys: bool = False

    @property
    def rerotates_keys(self) -> bool:
        """See `rerotate_keys`."""
        return self.rerotate_keys

    @property
    def latent_obstacle(self) -> str | None:
        """Turned keys alone stand in the way: the latent part has no position."""
        return "turns whole keys (rerotate_keys)" if self.rerotate_keys else None

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Later tokens score higher; the caller forces the sinks."""
        rows = inputs.rows
        positions = torch.arange(rows.num_tokens, dtype=torch.float32, device=rows.device)
        return positions.expand(rows.num_kv_heads, -1)
