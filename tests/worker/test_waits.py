"""No step waits for the device, and what it sends there it sends from pinned memory.

The steps run on the stand-in device, where what would wait raises; see `docs/host-overrides.md` for
the waits that are left, all of them asked for by a setting.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.stand_in import META, Shape, StandIn, jobs_of, replace_launches
from tests.worker import steps
from tests.worker.host_watch import watched
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.kernels import host_copy

SHAPE = Shape(num_layers=6)


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch) -> None:
    replace_launches(monkeypatch, lambda *_: None)


@pytest.mark.parametrize("name", preset_names())
def test_no_step_of_a_preset_waits(monkeypatch, name: str) -> None:
    config = parse_config(name)
    model = StandIn(config, SHAPE)
    with watched(monkeypatch) as sources:
        for own in model.configs:
            steps.prompt_ends(model, own, [4097, 777])
            steps.decoding(model, own, [777, 2003], 130)
            steps.reads_books(model, own, [777, 2003])
            steps.drafts(model, own, [777, 2003])
    assert sources.num_copies


@pytest.mark.parametrize("name", ["snapkv", "windowkv", "pyramidkv", "keydiff", "criticalkv"])
def test_no_compaction_while_decoding_waits(monkeypatch, name: str) -> None:
    config = parse_config({"preset": name, "trigger": "both", "interval": 128})
    model = StandIn(config, SHAPE)
    with watched(monkeypatch):
        steps.decoding(model, config, [777, 2003], 130)


@pytest.mark.parametrize(
    ("name", "num_groups"), [("snapkv", 1), ("windowkv_llama3", 4), ("pyramidkv", 6)]
)
def test_one_copy_per_compaction(monkeypatch, name: str, num_groups: int) -> None:
    """However many groups, requests and pins."""
    config = parse_config({"preset": name, "pinned": [[100, 120], [300, 310]]})
    config = config.by_task.get("aggregation", config)
    model = StandIn(config, SHAPE if num_groups != 4 else Shape(num_layers=32))
    assert model.num_groups == num_groups
    for row, length in enumerate([777, 2003]):
        model.window.add_request(str(row), [length], config.observation_window)
    steps.forward(model, [(row, 0, length) for row, length in enumerate([777, 2003])])
    with watched(monkeypatch) as sources:
        model.compactor.run(jobs_of(model, config, [777, 2003]))
    assert sources.num_copies == 1


class TestTheWatch:
    """It sees what it is there for."""

    ON_DEVICE = torch.zeros(8, 8, device=META)
    NUMBERS = torch.arange(3)

    FAULTS: list[tuple[str, Callable[[torch.Tensor, torch.Tensor], object]]] = [
        ("item", lambda x, n: x[0, 0].item()),
        ("branch", lambda x, n: bool((x > 0).any())),
        ("back", lambda x, n: x.cpu()),
        ("list", lambda x, n: x.tolist()),
        ("nonzero", lambda x, n: x.nonzero()),
        ("mask", lambda x, n: x[x > 0]),
        ("masked write", lambda x, n: x.__setitem__(x > 0, x[0].repeat(2))),
        ("pageable", lambda x, n: n.to(META, non_blocking=True)),
        ("numpy", lambda x, n: torch.from_numpy(np.arange(3)).to(META, non_blocking=True)),
        ("overwrites", lambda x, n: x[0, :3].copy_(n)),
        ("made there", lambda x, n: torch.tensor([1, 2], device=META)),
        ("list index", lambda x, n: x[[0, 1]]),
        ("host index", lambda x, n: x[n]),
        ("host operand", lambda x, n: x[:, :3] + n),
        ("blocking", lambda x, n: host_copy.host_buffer([3], torch.int64, META).to(META)),
    ]

    @pytest.mark.parametrize(("name", "fault"), FAULTS)
    def test_it_raises(self, monkeypatch, name: str, fault: Callable) -> None:
        with watched(monkeypatch), pytest.raises((AssertionError, NotImplementedError,
                                                  RuntimeError)):  # fmt: skip
            fault(self.ON_DEVICE, self.NUMBERS)

    def test_a_source_that_is_written_after_its_copy(self, monkeypatch) -> None:
        with watched(monkeypatch):
            buffer = host_copy.host_buffer([3], torch.int64, META)
            buffer.fill_(1).to(META, non_blocking=True)
            with pytest.raises(AssertionError, match="may still read"):
                buffer.fill_(2)

    def test_what_is_fine(self, monkeypatch) -> None:
        with watched(monkeypatch) as sources:
            host_copy.to_device([1, 2], torch.int32, META)
            host_copy.send_together([np.arange(3), np.zeros(2, dtype=bool)], META)
            host_copy.overwrite(torch.zeros(3, device=META), np.zeros(3, dtype=np.float32))
            self.ON_DEVICE[self.ON_DEVICE > 0] = 1.0
            self.ON_DEVICE[torch.zeros(2, dtype=torch.int64, device=META)] *= 2
            (self.NUMBERS * 2).tolist()
        assert sources.num_copies == 3
