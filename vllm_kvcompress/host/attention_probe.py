"""What transformers' own attention layers do with positions and with what they attended to.

A model that vLLM runs on its Transformers backend has its rotary embedding on the model and a word
in the configuration, or an attribute of a layer, for layers without one (SmolLM3's
``no_rope_layers``). No list of models is kept here. Every attention layer is built without weights,
its projections are replaced by ones that say the same at every position, and it is run at a few
positions: how its keys differ is what it does with positions, and which projection is given what
it attended to is its output projection.

Of attributes and modules nothing is taken on trust but frequencies, and those are compared with how
keys really turned.
"""

import inspect
import logging
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from vllm_kvcompress.kernels.formulas.rotary import Rotary

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM may not be there, and decides if it is

_INTERFACE = "kvcompress_attention_probe"
_POSITIONS = (0, 1, 6, 301)
_TOLERANCE = 1e-3  # of the longest vector; angles of position 301 are exact to 2e-5


@dataclass(frozen=True)
class ProbedLayer:
    """Of one attention layer, what is known.

    Attributes
    ----------
    rotary : Rotary or None
        How it turns keys and queries, on the CPU; with frequencies that are all zero where it does
        not; None if it does something else, or could not be run.
    output_projection : str or None
        Name, within the layer, of the linear layer that is given what was attended to and nothing
        else; None likewise.
    """

    rotary: Rotary | None = None
    output_projection: str | None = None

    @property
    def turns(self) -> bool:
        """Whether keys depend on their positions."""
        return self.rotary is not None and bool(self.rotary.inv_freq.any())


_probed: dict[tuple[str, bool], dict[int, ProbedLayer]] = {}


def probe(text: Any, trust_remote_code: bool = False) -> dict[int, ProbedLayer]:
    """Run every attention layer of a configuration's model class, once per process.

    Parameters
    ----------
    text : transformers.PreTrainedConfig
        Of the language model; stays as it is.
    trust_remote_code : bool, default=False
        Whether the class may be one that came with the model.

    Returns
    -------
    dict[int, ProbedLayer]
        By number of the layer. Without layers that could not be run or whose attention transformers
        do not dispatch, and empty where they have no such model.
    """
    if not hasattr(text, "to_json_string"):
        return {}
    key = text.to_json_string(use_diff=False), trust_remote_code
    if key not in _probed:
        _probed[key] = dict(_probe(deepcopy(text), trust_remote_code))
    return _probed[key]


def _probe(text: Any, trust_remote_code: bool) -> Iterator[tuple[int, ProbedLayer]]:
    from transformers import AttentionInterface

    seen = _Seen()
    AttentionInterface.register(_INTERFACE, seen.attend)
    text._attn_implementation = _INTERFACE
    try:
        model = _without_weights(text, trust_remote_code)
    except Exception:  # whatever a class says of a configuration that it does not take
        logger.debug("KV compression: transformers make no such model", exc_info=True)
        return
    # Made again where there is memory: their frequencies are computed, not loaded.
    embeddings = [
        type(module)(text)
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]
    for module in filter(_may_be_attention, model.modules()):
        seen.module = None
        try:
            found = _run(module, embeddings, seen, text)
        except Exception:  # likewise: a layer that is called otherwise is one we do not know
            logger.debug("KV compression: %s was not run", type(module).__name__, exc_info=True)
            continue
        number = _number(module)
        if seen.module is module and isinstance(number, int):
            yield number, found


def _without_weights(text: Any, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModel

    with ExitStack() as stack:
        if "vllm" in sys.modules:
            from vllm.config import CompilationMode, set_current_vllm_config

            # vLLM's backend decorates transformers' classes in place. Once it has, they ask for a
            # configuration, and whether to compile: nothing else of it is read.
            plain: Any = SimpleNamespace(
                compilation_config=SimpleNamespace(mode=CompilationMode.NONE),
                model_config=SimpleNamespace(hf_config=text),
            )
            stack.enter_context(set_current_vllm_config(plain))
        stack.enter_context(torch.device("meta"))
        return AutoModel.from_config(text, trust_remote_code=trust_remote_code)


def _may_be_attention(module: nn.Module) -> bool:
    """Whether it has a number and takes position embeddings, and nothing in it has a number."""
    numbered = [each for each in module.modules() if isinstance(_number(each), int)]
    return (
        numbered == [module]
        and "position_embeddings" in inspect.signature(type(module).forward).parameters
    )


def _number(module: nn.Module) -> object:
    return getattr(module, "layer_idx", None)


class _Seen:
    """Stands in for attention: remembers what it is given, and returns noise."""

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.queries = self.keys = self.output = torch.empty(0)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, H, n, D] and [1, KV, n, D] are given, [1, n, H, D] is returned."""
        self.module, self.queries, self.keys = module, query[0], key[0]
        shape = 1, query.shape[2], query.shape[1], value.shape[3]
        self.output = _noise("output", *shape)
        return self.output, None


class _Projection(nn.Module):
    """Stands in for a linear layer: the same noise at every position."""

    def __init__(self, name: str, out_features: int) -> None:
        super().__init__()
        self.row = _noise(name, out_features)
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.given = x
        return self.row.expand(*x.shape[:-1], -1)


def _noise(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator)


@torch.inference_mode()
def _run(module: nn.Module, embeddings: list[nn.Module], seen: _Seen, text: Any) -> ProbedLayer:
    projections: dict[str, _Projection] = {}
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            parent, _, own_name = name.rpartition(".")
            projections[name] = _Projection(name, child.out_features)
            setattr(module.get_submodule(parent), own_name, projections[name])
    for each in module.modules():
        for name, weight in each.named_parameters(recurse=False):
            # Of norms, for example: unequal ones, which show where keys are scaled once turned.
            some = 1 + _noise(name, *weight.shape).abs()
            setattr(each, name, nn.Parameter(some, requires_grad=False))
    positions = torch.tensor([_POSITIONS])
    hidden = _noise("hidden", text.hidden_size).expand(1, len(_POSITIONS), -1)
    given, inv_freq = _position_embeddings(embeddings, hidden, positions, module, text)
    module(hidden_states=hidden, position_embeddings=given, attention_mask=None)
    attended = seen.output.flatten(2)
    found = [
        name
        for name, projection in projections.items()
        if projection.given is not None
        and projection.given.shape == attended.shape
        and torch.equal(projection.given, attended)
    ]
    return ProbedLayer(
        rotary=_rotary(seen, positions[0], inv_freq),
        output_projection=found[0] if len(found) == 1 else None,
    )


def _position_embeddings(
    embeddings: list[nn.Module],
    hidden: torch.Tensor,
    positions: torch.Tensor,
    module: nn.Module,
    text: Any,
) -> tuple[Any, torch.Tensor]:
    """What the model hands its layers, and the frequencies [rotary_dim / 2] behind it."""
    if len(embeddings) != 1:
        raise LookupError(f"{len(embeddings)} rotary embeddings, and which is for what is unknown")
    embedding = embeddings[0]
    if "layer_type" not in inspect.signature(type(embedding).forward).parameters:
        return embedding(hidden, positions), embedding.get_buffer("inv_freq")
    kind = text.layer_types[module.layer_idx]
    return embedding(hidden, positions, kind), embedding.get_buffer(f"{kind}_inv_freq")


def _rotary(seen: _Seen, positions: torch.Tensor, inv_freq: torch.Tensor) -> Rotary | None:
    """The rotary embedding that makes queries and keys at all positions of those at the first."""
    inv_freq = inv_freq.float()
    for frequencies, is_neox in (
        (torch.zeros_like(inv_freq), True),
        (inv_freq, True),
        (inv_freq, False),
    ):
        rotary = Rotary(frequencies, is_neox)
        if all(_is_turned(rotary, rows, positions) for rows in (seen.queries, seen.keys)):
            return rotary
    return None


def _is_turned(rotary: Rotary, rows: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether rows [heads, n, head_dim] are the first of them, turned by their positions."""
    expected = rotary.rotate(rows[:, :1].expand_as(rows), positions)
    return bool((rows - expected).abs().max() < _TOLERANCE * rows.norm(dim=-1).max())
