"""Requests as the API server sends them to the engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest


def incoming(
    extra: Mapping[str, Any] | None, prompt: Sequence[int], resumable: bool = False
) -> EngineCoreRequest:
    """A request with such ``vllm_xargs``."""
    return EngineCoreRequest(
        request_id="r",
        prompt_token_ids=list(prompt),
        mm_features=None,
        sampling_params=SamplingParams(extra_args=dict(extra) if extra else None),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=resumable,
    )
