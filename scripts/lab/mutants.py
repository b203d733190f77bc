"""Judges the mutants that mutmut has made.

    pip install mutmut
    python -m mutmut run no.such.mutant            # makes mutants/ and sees which test reaches what
    python -m lab.mutants OUT.json ["vllm_kvcompress.core.room.*" ...]

mutmut's own `run` collects the tests anew for every mutant and takes the shortest first. Here one
process collects, a fork judges each mutant, and tests that killed its neighbours come first. A
mutant is judged by the tests that reach its function, and by all that are newer than mutants/;
by the first `--seconds` of them, as one that lives would cost minutes otherwise. A test that fails
in a fork without any mutant judges none, and is named. What OUT.json has is not judged again.
"""

import argparse
import fnmatch
import json
import os
import re
import resource
import signal
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MUTANTS = Path("mutants")
UNCHANGED = ""
"""In the place of a mutant's name: the code as it is."""
KILLED, SURVIVED, TIMEOUT, UNREACHED = "killed", "survived", "timeout", "no tests"


def function_of(mutant: str) -> str:
    """Mangled name of the function that a mutant is made of."""
    return re.sub(r"__mutmut_\d+$", "", mutant)


def module_of(mutant: str) -> str:
    return function_of(mutant).split(".x")[0]


@dataclass
class Order:
    """Which tests judge a mutant, the likeliest to kill it for its seconds first.

    Attributes
    ----------
    reached_by : Mapping[str, Sequence[str]]
        Tests by function.
    seconds : Mapping[str, float]
        By test. One that is missing is new, and judges every mutant.
    limit : float
        Seconds of tests for one mutant; a test that does not fit any more is left out.
    """

    reached_by: Mapping[str, Sequence[str]]
    seconds: Mapping[str, float]
    limit: float = float("inf")
    kills: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def tests(self, mutant: str, collected: Sequence[str]) -> list[str]:
        there = set(collected)
        reaching = [test for test in self.reached_by.get(function_of(mutant), ()) if test in there]
        new = [test for test in collected if test not in self.seconds]
        near, far = self.kills[function_of(mutant)], self.kills[module_of(mutant)]
        own = f"test_{module_of(mutant).rsplit('.', 1)[-1]}"

        def worth(test: str) -> float:
            is_own = test.split("::")[0].rsplit("/", 1)[-1].startswith(own)
            found = 4 * near[test] + far[test] + (1 if is_own else 0.1)
            return found / (self.seconds.get(test, 0.1) + 0.03)

        chosen, left = list[str](), self.limit
        for test in sorted([*new, *reaching], key=worth, reverse=True):
            if not chosen or self.took([test]) <= left:
                chosen.append(test)
                left -= self.took([test])
        return chosen

    def took(self, tests: Sequence[str]) -> float:
        return sum(self.seconds.get(test, 0.1) for test in tests)

    def killed(self, mutant: str, test: str) -> None:
        self.kills[function_of(mutant)][test] += 1
        self.kills[module_of(mutant)][test] += 1


def score(verdicts: Mapping[str, Sequence[str]]) -> list[tuple[str, Counter[str]]]:
    """Verdicts by module, and of all."""
    modules: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant, (verdict, *_) in verdicts.items():
        modules[module_of(mutant)][verdict] += 1
    found = sorted(modules.items())
    return [*found, ("all", sum((counts for _, counts in found), Counter()))]


def mutants(patterns: Sequence[str]) -> Iterator[str]:
    for meta in sorted(MUTANTS.rglob("*.meta")):
        for name in json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                yield name


@dataclass
class Judge:
    """A pytest plugin: instead of the collected tests it runs mutants."""

    names: Sequence[str]
    order: Order
    out: Path
    verdicts: dict[str, Any]
    failed: bool = False
    is_sound: dict[str, bool] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        if session.testsfailed:
            raise SystemExit("the tests cannot be collected")
        session.config.pluginmanager.unregister(name="terminalreporter")  # a dot for each test
        items = {item.nodeid: item for item in session.items}
        self.warm_up(session.items)
        for name in self.names:
            if name in self.verdicts:
                continue
            tests = self.order.tests(name, list(items))
            verdict, killer = self.verdict(name, [items[test] for test in tests])
            if killer:
                self.order.killed(name, killer)
            self.verdicts[name] = [verdict, killer]
            self.out.write_text(json.dumps(self.verdicts, indent=0), encoding="utf-8")
            if verdict != KILLED:
                print(f"{verdict}: {name}", file=sys.stderr, flush=True)
        return True

    def warm_up(self, items: Sequence[Any]) -> None:
        """One test of each file: what it imports late no fork imports again."""
        first = {item.path: item for item in reversed(items)}
        for item in first.values():
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if self.failed:
            raise SystemExit("a test fails without a mutant")

    def verdict(self, name: str, items: Sequence[Any]) -> tuple[str, str]:
        """A verdict, and the test that killed it: one that passes where nothing is changed."""
        while True:
            asked = [item for item in items if self.is_sound.get(item.nodeid, True)]
            verdict, killer = self.judge(name, asked)
            if killer and killer not in self.is_sound:
                alone = [item for item in asked if item.nodeid == killer]
                self.is_sound[killer] = self.judge(UNCHANGED, alone)[0] == SURVIVED
                if not self.is_sound[killer]:
                    print(f"fails without a mutant: {killer}", file=sys.stderr, flush=True)
                    continue
            return verdict, killer

    def judge(self, name: str, items: Sequence[Any]) -> tuple[str, str]:
        """What so many tests say, in a fork."""
        if not items:
            return UNREACHED, ""
        limit = int(3 * self.order.took([item.nodeid for item in items]) + 10)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 2))
            os._exit(self._run(name, items, writing))
        os.close(writing)
        with os.fdopen(reading) as said:
            killer = said.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return TIMEOUT if os.WTERMSIG(status) == signal.SIGXCPU else KILLED, ""
        return (KILLED if os.WEXITSTATUS(status) else SURVIVED), killer

    def _run(self, name: str, items: Sequence[Any], writing: int) -> int:
        """In the fork: 1 as soon as a test fails."""
        from mutmut.mutation import trampoline

        trampoline.set_mutant_under_test(name)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        for item, following in zip(items, [*items[1:], None], strict=True):
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            except BaseException:  # a mutant may raise anything, an exit, too
                self.failed = True
            if self.failed:
                os.write(writing, item.nodeid.encode())
                return 1
        return 0


def main() -> int:
    """Judge what the arguments name, and print the score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="verdicts; those that it has stand")
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of mutants")
    parser.add_argument("--seconds", type=float, default=6, help="of tests for one (default: 6)")
    args = parser.parse_intermixed_args()
    if not (MUTANTS / "mutmut-stats.json").is_file():
        parser.error("no mutants/ here: python -m mutmut run no.such.mutant makes it")
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    stats = json.loads((MUTANTS / "mutmut-stats.json").read_text(encoding="utf-8"))
    order = Order(stats["tests_by_mangled_function_name"], stats["duration_by_test"], args.seconds)
    out = args.out.absolute()
    verdicts = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    judge = Judge(list(mutants(args.patterns)), order, out, verdicts)
    os.chdir(MUTANTS)
    sys.path.insert(0, os.getcwd())
    os.environ["MUTANT_UNDER_TEST"] = UNCHANGED

    import pytest

    words = [*settings["pytest_add_cli_args_test_selection"], *settings["pytest_add_cli_args"]]
    fast = ["--rootdir=.", "-q", "--tb=native", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    status = pytest.main([*fast, *words], plugins=[judge])
    for module, counts in score(verdicts):
        total, dead = sum(counts.values()), counts[KILLED] + counts[TIMEOUT]
        share = f"{dead / total:.1%}" if total else "none"
        print(f"{module}: {total} mutants, {share} noticed, {dict(counts)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
