"""StreamingLLM: what is kept, and the switch the worker reads."""

import pytest
import torch

from tests.policies.helpers import make_inputs, select
from vllm_kvcompress.policies.adakv import AdaKV
from vllm_kvcompress.policies.streaming_llm import StreamingLLM


@pytest.mark.parametrize("rerotate_keys", [False, True])
def test_keeps_sinks_and_the_most_recent(rerotate_keys: bool) -> None:
    policy = StreamingLLM(rerotate_keys=rerotate_keys)
    given = make_inputs()
    kept = select(policy.score(given), given.forced, 64)
    assert kept.tolist() == [[0, 1, 2, 3, *range(90, 150)]] * 2
    without = policy.score(make_inputs(queries=None, rotary=None))
    assert torch.equal(without, policy.score(given))


def test_rerotates_only_on_request() -> None:
    assert not StreamingLLM().rerotates_keys
    assert StreamingLLM(rerotate_keys=True).rerotates_keys


def test_another_policys_scorer_cannot_turn_keys() -> None:
    with pytest.raises(ValueError, match="must not re-rotate"):
        AdaKV(scorer={"name": "streaming_llm", "rerotate_keys": True})
