"""A mode is a class and a line in `MODES`: one that notes its hooks sees a whole life."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.conftest import opened
from tests.stand_in import Shape, StandIn, replace_launches
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.worker import model_runner
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.features import Feature, make_features
from vllm_kvcompress.worker.modes import MODES

SETTING = {"preset": "snapkv", "budget": {"ratio": 0.5}, "min_prompt_len": 64}
Calls = list[tuple[str, Any]]


class Noted(Feature):
    """Notes which hook is called, and with what where it matters; wanted with 7 sink tokens."""

    calls: Calls

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self.calls = []

    @staticmethod
    def is_wanted(config: CompressionConfig) -> bool:
        return config.num_sink_tokens == 7

    def take(self) -> Calls:
        """The calls since the last `take`."""
        calls, self.calls = self.calls, []
        return calls

    def begin_batch(self, input_batch: Any, any_compacted: bool) -> None:
        self.calls.append(("begin_batch", any_compacted))

    def compact(self, jobs: Sequence[CompactionJob]) -> None:
        self.calls.append(("compact", [job.req_index for job in jobs]))

    def watch_layer(self, name: str, layer: Any) -> None:
        self.calls.append(("watch_layer", name))


def noting(name: str) -> Any:
    def hook(self: Noted, *args: Any) -> Any:
        self.calls.append((name, None))
        return getattr(Feature, name)(self, *args)

    return hook


HOOKS = [name for name in vars(Feature) if not name.startswith("_") and name not in vars(Noted)]
for _name in HOOKS:
    setattr(Noted, _name, noting(_name))


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    patch.setattr(model_runner, "MODES", [*MODES, Noted])
    with opened(probe_model, {**SETTING, "num_sink_tokens": 7}) as engine:
        yield engine
    patch.undo()


def names(calls: Calls) -> list[str]:
    return [name for name, _ in calls]


@pytest.mark.engine
def test_a_further_mode_sees_every_hook_in_order(engine: Engine) -> None:
    *others, noted = engine.runner.features
    assert isinstance(noted, Noted) and not any(isinstance(each, Noted) for each in others)
    calls = noted.take()
    watched = [each for name, each in calls if name == "watch_layer"]
    assert watched == list(engine.runner.compacted_layers.by_name())
    assert names(calls) == ["before_load", "after_load", *["watch_layer"] * len(watched), "bind"]

    engine.add("a", list(range(3, 103)), 3, ignore_eos=True)
    engine.step()
    row = engine.runner.model_state.row_of(engine.live()["a"].request_id)
    # Queries are recorded, which keeps the step out of full graphs: nobody else is asked.
    assert noted.take() == [
        ("begin_step", None), ("reset_row", None), ("begin_batch", False), ("end_batch", None),
        ("compact", [row]), ("after_compaction", None), ("report", None),
        ("late_report", None),
    ]  # fmt: skip
    decoded = [
        ("begin_step", None), ("blocks_full_graph", None), ("begin_batch", True),
        ("end_batch", None), ("report", None), ("late_report", None),
    ]  # fmt: skip
    engine.step()
    assert noted.take() == decoded
    engine.step()
    engine.step()  # the worker hears of a finished request with the next step
    assert names(noted.take()) == [*names(decoded), "begin_step", "reset_row", "end_batch"]


def test_only_wanted_features_are_made() -> None:
    runner: Any = SimpleNamespace(device=torch.device("cpu"))
    kinds = [*MODES, Noted]

    def made(setting: dict[str, Any]) -> set[str]:
        config = parse_config({**SETTING, **setting})
        assert config is not None
        return {type(each).__name__ for each in make_features(kinds, config, runner)}

    assert made({}) == {"CodebookFeature"}
    assert made({"mode": "draft"}) == {"CodebookFeature", "DraftFeature"}
    assert made({"num_sink_tokens": 7}) == {"CodebookFeature", "Noted"}


def test_warm_up_comes_to_features(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_launches(monkeypatch, lambda *_: None)
    config = parse_config(SETTING)
    assert config is not None
    model = StandIn(config, Shape(num_layers=2))
    noted = Noted(model.runner)
    model.runner.features.append(noted)
    model.runner.warm_up_compaction()
    assert names(noted.take()) == ["warm_up"]
