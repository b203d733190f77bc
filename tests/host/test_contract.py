"""What we rely on in the vLLM that is installed, found by importing it.

`test_host_sources.py` has what can be told from sources alone, of other releases too. A release of
vLLM that changes one of these fails there or here, by name, before anything subtler does.
"""

import importlib
import inspect

import pytest

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.host.checks import TESTED_VLLM
from vllm_kvcompress.host.hooks import _MARK, HOOKS, Hook, install_hooks


def resolve(target: str):
    module, _, path = target.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target)
def test_wrapped_functions_have_the_expected_signature(hook: Hook) -> None:
    hook.check_signature()
    assert hook.reason


def test_layers_are_the_targets_unless_marked() -> None:
    layer = resolve("vllm.model_executor.layers.attention_layer_base:AttentionLayerBase")
    assert layer.is_draft_layer is False


def test_batch_state_can_be_replaced() -> None:
    """We turn `decode_graph_eligible` off for steps whose queries are needed."""
    assert hasattr(resolve("vllm.v1.worker.gpu.model_runner:BatchReqState"), "_replace")


def test_draft_steps_can_be_captured() -> None:
    """Metadata is built for capture by a flag, from what we give."""
    build = resolve("vllm.v1.worker.gpu.attn_utils:build_attn_metadata")
    asked = {"for_cudagraph_capture", "seq_lens_cpu_upper_bound", "positions", "is_prefilling"}
    assert asked | {"max_query_len", "max_seq_len", "req_idx"} <= set(
        inspect.signature(build).parameters
    )
    assert resolve("vllm.v1.worker.gpu.cudagraph_utils:AttentionState")._fields == (
        "attn_metadata",
        "slot_mappings",
    )
    for name, value in (("NULL_BLOCK_ID", 0), ("PAD_SLOT_ID", -1)):
        assert resolve(f"vllm.v1.attention.backends.utils:{name}") == value


def test_the_installed_vllm_is_a_tested_one() -> None:
    import vllm

    assert vllm.__version__.startswith(TESTED_VLLM)


def test_hooks_are_installed_once() -> None:
    install_hooks()
    first = [getattr(*hook.resolve()[:2]) for hook in HOOKS]
    install_hooks()
    second = [getattr(*hook.resolve()[:2]) for hook in HOOKS]
    for before, after in zip(first, second, strict=True):
        assert getattr(before, "__func__", before) is getattr(after, "__func__", after)
        assert getattr(after, _MARK)


def test_a_changed_host_is_refused_by_name() -> None:
    hook = Hook(HOOKS[0].target, "test", ("parser", "something_new"), lambda f: f)
    with pytest.raises(UnsupportedModelError, match=r"EngineArgs\.add_cli_args.*install vllm"):
        hook.check_signature()


def test_overrides_stay_short() -> None:
    """Nothing of the host is pasted: an override calls super() and adds a little."""
    from vllm_kvcompress.core.draft.scheduling import DraftMixin
    from vllm_kvcompress.core.scheduler import CompressionMixin
    from vllm_kvcompress.worker.draft.typical_acceptance import TypicalAcceptanceSampler
    from vllm_kvcompress.worker.model_runner import CompressionRunnerMixin
    from vllm_kvcompress.worker.model_state import CompressionStateMixin

    owners = (CompressionMixin, DraftMixin, CompressionRunnerMixin, CompressionStateMixin)
    for owner in (*owners, TypicalAcceptanceSampler):
        for name, member in vars(owner).items():
            if inspect.isfunction(member):
                lines = len(inspect.getsource(member).splitlines())
                assert lines <= 40, f"{owner.__name__}.{name} has {lines} lines"
