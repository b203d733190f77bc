"""Grid, prompts, splits and the choice: everything of a tuning that runs no model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vllm_kvcompress.cli.main import make_parser
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.tuning.choose import (
    FEWEST_PROMPTS,
    MOST_CHAINS,
    Aim,
    calibration_size,
    choose,
    make_chains,
    num_chains,
    repeat,
    split_prompts,
)
from vllm_kvcompress.evaluation.tuning.grid import BUDGETS, GRID_CHAINS, make_candidates
from vllm_kvcompress.evaluation.tuning.losses import (
    Loss,
    LossFolder,
    LossTable,
    loss_table,
    missing,
)
from vllm_kvcompress.evaluation.tuning.prompts_file import read_prompts
from vllm_kvcompress.evaluation.tuning.result import best_provable

# --- the grid -----------------------------------------------------------------------------


def test_every_chain_of_the_grid_is_a_setting_of_its_own() -> None:
    found = make_candidates(["grid"], BUDGETS)
    assert len(found) == (1 + len(GRID_CHAINS)) * len(BUDGETS)
    assert {each.chain for each in found} == {"auto", *GRID_CHAINS}
    assert make_candidates(["grid", "auto"], BUDGETS) == found
    assert len({each.digest for each in found}) == len(found)
    assert all(each.config.budget.ratio == each.budget for each in found)
    for chain in make_chains(found):
        budgets = [found[i].budget for i in chain]
        assert budgets == sorted(BUDGETS, reverse=True)
        assert len({found[i].chain for i in chain}) == 1


def test_the_command_has_the_budgets_of_the_grid() -> None:
    needed = ["tune", "--model", "m", "--prompts", "p", "--target", "0.9", "--out", "o"]
    args = make_parser().parse_args(needed)
    assert tuple(args.budgets) == BUDGETS and args.policies == ["grid"]


def test_a_budget_is_that_of_every_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    tasks = {"localization": {"budget": {"ratio": 0.3}}, "aggregation": {"observation_window": 8}}
    fields = {"policy": {"name": "snapkv"}, "budget": {"ratio": 0.2, "floor": 16}, "tasks": tasks}
    path.write_text(yaml.safe_dump(fields))
    (candidate,) = make_candidates([str(path)], [0.1])
    assert candidate.name == "mine@0.1" and candidate.depends_on_task
    for task in ("localization", "aggregation"):
        setting = candidate.setting(task)
        assert setting.budget.ratio == 0.1 and setting.budget.floor == 16
    assert candidate.setting("aggregation").observation_window == 8


def test_an_edited_file_is_another_setting(tmp_path: Path) -> None:
    path, digests = tmp_path / "mine.yaml", set()
    for window in (8, 16):
        fields = {"policy": {"name": "snapkv"}, "budget": {"ratio": 0.2}}
        path.write_text(yaml.safe_dump({**fields, "observation_window": window}))
        digests.add(make_candidates([str(path)], [0.1])[0].digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        (["snapvk"], "there is no 'snapvk' (did you mean 'snapkv'?)"),
        (["none"], "there is no 'none'"),
        (["a/mine.yaml", "b/mine.yaml"], "are both called mine"),
        (["late.yaml"], "has the trigger interval and the mode evict"),
        (["draft.yaml"], "and the mode draft"),
    ],
)
def test_settings_that_cannot_be_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policies: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fields: dict[str, Any] = {"policy": {"name": "snapkv"}, "budget": {"ratio": 0.2}}
    for name, extra in {
        "a/mine": {"observation_window": 8},
        "b/mine": {},
        "late": {"trigger": "interval"},
        "draft": {"mode": "draft"},
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**fields, **extra}))
    with pytest.raises(ConfigError) as caught:
        make_candidates(policies, [0.5])
    assert words in str(caught.value) and str(caught.value).startswith("--policies: ")


# --- prompts ------------------------------------------------------------------------------


def written(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "mine.jsonl"
    texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_both_forms_of_prompts_are_read(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        {"prompt": "a\u2028b"},
        "",
        {
            "context": "c",
            "question": "q",
            "answer_prefix": "p",
            "answers": ["x"],
            "metric": "qa_f1",
        },
    )
    first, second = read_prompts(path, False, 9)
    assert (first.sample.context, first.sample.question) == ("a\u2028b", "")
    assert first.place == f"{path}:1" and second.place == f"{path}:3"
    assert second.sample.answers == ("x",) and second.sample.metric == "qa_f1"
    assert second.sample.answer_prefix == "p" and second.sample.max_tokens == 9


def test_a_prompt_is_known_by_what_it_says(tmp_path: Path) -> None:
    fields = {"context": "c", "question": "q", "answers": ["x"]}
    turned = dict(reversed(fields.items()))
    other = {**fields, "answers": ["y"]}
    digests = [each.digest for each in read_prompts(written(tmp_path, fields, turned, other), 1, 9)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", marks=pytest.mark.deep),
        ("[1]", "expected a JSON object"),
        ({"promt": "a"}, "unknown field 'promt' (did you mean 'prompt'?)"),
        ({}, "has no context"),
        ({"context": "a"}, "has no question"),
        ({"prompt": "a", "question": "b"}, "prompt and question exclude each other"),
        ({"prompt": " \n"}, "prompt: must not be empty"),
        ({"prompt": 3}, "prompt: must be text, got 3"),
        ({"context": "a", "question": ["b"]}, "question: must be text"),
        ({"prompt": "a"}, "has no answers, which --measure answers needs"),
        ({"prompt": "a", "answers": []}, "answers: must be a list of texts"),
        ({"prompt": "a", "answers": "b"}, "answers: must be a list of texts"),
        ({"prompt": "a", "answers": ["b", ""]}, "answers: must be a list of texts"),
        ({"prompt": "a", "answers": ["b"], "metric": "all"}, "there is no metric 'all'"),
        ({"prompt": "a", "answers": ["b"], "metric": ["x"]}, "there is no metric ['x']"),
        ({"prompt": "a", "answers": ["b"], "metric": "classification"}, "there is no metric"),
        ({"prompt": "a", "answers": ["b"], "answer_prefix": 1}, "answer_prefix: must be text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, words: str) -> None:
    path = written(tmp_path, {"prompt": "good", "answers": ["b"]}, line)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path, True, 9)
    message = str(caught.value)
    assert words in message and f"{path.name}:2: " in message
    assert message.endswith(".") and "\n" not in message


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no prompt"):
        read_prompts(written(tmp_path, "", " "), False, 9)
    with pytest.raises(ConfigError, match="No such file"):
        read_prompts(tmp_path / "other.jsonl", False, 9)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe4"}')
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_prompts(tmp_path / "latin", False, 9)
    with pytest.raises(ConfigError, match="mine.jsonl:1: metric: means nothing without answers"):
        read_prompts(written(tmp_path, {"prompt": "a", "metric": "qa_f1"}), False, 9)


# --- losses on disk -----------------------------------------------------------------------


def loss(prompt: str = "p", setting: str = "s", value: float = 0.5) -> Loss:
    return Loss(prompt, setting, "snapkv@0.5", value, 0.5, 600, 0.1)


def test_losses_come_back_and_half_a_line_is_dropped(tmp_path: Path) -> None:
    folder = LossFolder(tmp_path / "out")
    assert folder.start({"tokens": 8}, {}) == []
    folder.add([loss(), loss("q")])
    with (tmp_path / "out" / "losses.jsonl").open("a") as file:
        file.write('{"prompt": "r')
    assert folder.start({"tokens": 8}, {}) == [loss(), loss("q")]
    folder.add([loss("r")])
    assert folder.start({"tokens": 8}, {}) == [loss(), loss("q"), loss("r")]


def test_another_run_is_refused(tmp_path: Path) -> None:
    LossFolder(tmp_path).start({"tokens": 8}, {})
    with pytest.raises(ConfigError, match=r"holds another run \(tokens was 8, is 9\)"):
        LossFolder(tmp_path).start({"tokens": 9}, {})
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="no file of kvcompress tune"):
        LossFolder(tmp_path).start({"tokens": 8}, {})


@pytest.mark.parametrize("line", ["{}", "x", '{"a": 1}', json.dumps({**vars(loss()), "loss": 2})])
def test_lines_that_are_no_losses_are_named(tmp_path: Path, line: str) -> None:
    folder = LossFolder(tmp_path)
    folder.start({}, {})
    folder.add([loss()])
    with (tmp_path / "losses.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match="losses.jsonl:2: no loss of kvcompress tune"):
        folder.start({}, {})


def test_only_what_is_missing_is_measured_and_twins_once(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]
    prompts = read_prompts(written(tmp_path, *lines), False, 9)
    candidates = make_candidates(["keydiff-o16"], [0.5, 0.25])
    known = [loss(prompts[0].digest, candidates[0].digest, 0.25)]
    left = [(p.digest, [c.name for c in todo]) for p, todo in missing(prompts, candidates, known)]
    assert left == [
        (prompts[0].digest, ["keydiff-o16@0.25"]),
        (prompts[1].digest, ["keydiff-o16@0.5", "keydiff-o16@0.25"]),
    ]
    every = [loss(p.digest, c.digest, i / 10) for i, p in enumerate(prompts) for c in candidates]
    assert missing(prompts, candidates, every) == []
    assert loss_table(prompts, candidates, every).losses.tolist() == [
        [0.2] * 2,
        [0.1] * 2,
        [0.2] * 2,
    ]


# --- splits -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 6, 12, 60, 1001])
def test_parts_are_disjoint_and_together_everything(count: int) -> None:
    seen = set()
    for number in range(4):
        split = split_prompts(count, 7, number)
        parts = [split.screening, split.calibration, split.held_out]
        assert sorted(np.concatenate(parts).tolist()) == list(range(count))
        assert min(map(len, parts)) >= 1 and len(split.calibration) == calibration_size(count)
        assert len(split.calibration) >= 0.5 * count
        seen.add(tuple(np.concatenate(parts).tolist()))
        again = split_prompts(count, 7, number)
        assert all(np.array_equal(getattr(split, k), getattr(again, k)) for k in vars(split))
    assert len(seen) > 1
    assert count >= FEWEST_PROMPTS


def test_chains_are_as_many_as_prompts_can_afford() -> None:
    aim = Aim(0.1, 0.1)
    numbers = [num_chains(count, aim) for count in (3, 36, 60, 70, 120, 2000)]
    assert numbers == sorted(numbers) and numbers[0] == 1 and numbers[-1] == MOST_CHAINS


# --- the choice ---------------------------------------------------------------------------

BUDGETS_OF_TWO = (0.5, 0.25, 0.12)


def table_of(rates: list[float], count: int = 120, seed: int = 0) -> LossTable:
    losses = (np.random.default_rng(seed).random((count, 1)) < np.array(rates)).astype(float)
    kept = np.tile([0.5, 0.25, 0.12], (count, len(rates) // 3))
    return LossTable(losses, kept, np.full(count, 600))


def one_chain(rates: list[float], aim: Aim, **options: int) -> int | None:
    split = split_prompts(120, 0)
    chosen = choose(table_of(rates, **options), [[0, 1, 2]], split, aim).chosen
    return None if chosen is None else chosen.setting


def test_harder_targets_are_never_cheaper() -> None:
    for seed in range(5):
        rates, order = [0.0, 0.05, 0.2], {None: -1, 0: 0, 1: 1, 2: 2}
        by_limit = [
            order[one_chain(rates, Aim(x, 0.1), seed=seed)] for x in (0.01, 0.05, 0.15, 0.4)
        ]
        by_level = [order[one_chain(rates, Aim(0.15, x), seed=seed)] for x in (0.001, 0.05, 0.3)]
        assert by_limit == sorted(by_limit) and by_level == sorted(by_level)
        assert by_limit[0] == -1 and by_limit[-1] == 2


def test_the_cheapest_of_all_chains_is_chosen_and_held_out_prompts_do_not_matter() -> None:
    table = table_of([0.0, 0.01, 0.9, 0.0, 0.0, 0.01])
    split, aim = split_prompts(120, 0), Aim(0.2, 0.1)
    choice = choose(table, [[0, 1, 2], [3, 4, 5]], split, aim)
    assert choice.chosen is not None and choice.chosen.setting == 5
    table.losses[split.held_out] = 1 - table.losses[split.held_out]
    assert choose(table, [[0, 1, 2], [3, 4, 5]], split, aim).chosen == choice.chosen


def test_a_setting_behind_one_that_stands_does_not_qualify() -> None:
    """Fixed sequence: no luck at a smaller budget."""
    table = table_of([0.0, 0.9, 0.0])
    choice = choose(table, [[0, 1, 2]], split_prompts(120, 0), Aim(0.2, 0.1))
    assert [test.is_rejected for test in choice.chains[0]] == [True, False, False]
    assert choice.chosen is not None and choice.chosen.setting == 0
    assert choice.closest.setting == 1


def test_which_chains_are_tested_does_not_depend_on_the_test_prompts() -> None:
    """Neither through losses nor through lengths."""
    rng = np.random.default_rng(3)
    table = table_of([0.02, 0.05, 0.3] * 8, seed=1)
    split, chains = split_prompts(120, 0), [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]
    first = choose(table, chains, split, Aim(0.2, 0.1))
    others = np.concatenate([split.calibration, split.held_out])
    losses, kept = table.losses.copy(), table.kept.copy()
    losses[others] = rng.random((len(others), 24))
    kept[others] = rng.random((len(others), 24)) / 2
    second = choose(LossTable(losses, kept, table.lengths), chains, split, Aim(0.2, 0.1))
    assert [[t.setting for t in c] for c in first.chains] == [
        [t.setting for t in c] for c in second.chains
    ]


def test_settings_that_free_nothing_are_not_chosen() -> None:
    table = table_of([0.0, 0.0, 0.9])
    table.kept[:, 0] = 1.0
    choice = choose(table, [[0, 1, 2]], split_prompts(120, 0), Aim(0.2, 0.1))
    assert [test.setting for test in choice.chains[0]] == [1, 2]


def test_other_splits_are_chosen_on_alike() -> None:
    table = table_of([0.0, 0.02, 0.5])
    found = list(repeat(table, [[0, 1, 2]], Aim(0.15, 0.1), 0, 6))
    assert len(found) == 6 and {each.setting for each in found} <= {0, 1, None}
    assert all(each.cost == table.costs[each.setting] for each in found if each.setting is not None)
    nothing = list(repeat(table_of([0.9] * 3), [[0, 1, 2]], Aim(0.15, 0.1), 0, 2))
    assert [(each.setting, each.cost) for each in nothing] == [(None, 1.0)] * 2


def test_few_prompts_are_told_what_they_can_show() -> None:
    aim = Aim(0.05, 0.1)
    text = best_provable(20, aim)
    assert text is not None and "of 20 prompts 12 are left for the test" in text
    # 0.1 ** (1 / 12) is 0.8254; 45 prompts without loss show 0.95, of 75 in all.
    assert "mean of at least 0.825 " in text and text.endswith(
        "the target 0.95 takes 75 prompts or more."
    )
    assert calibration_size(75) == 45 and 0.95**45 <= 0.1 < 0.95**44
    assert best_provable(75, aim) is None
    few = best_provable(20, Aim(0.5, 0.1))
    assert few is not None and few.endswith("and no more.")
