"""vLLM's own schedulers with our classes on top, and a worker that remembers what is where.

What lies in which slot is watched by a worker that knows only what it is told (told_worker.py).
"""

from typing import Any

from vllm.v1.request import Request

from tests.core.test_scheduler_loop import BLOCK, Loop
from tests.core.told_worker import ToldWorker

UNEVEN = {
    "preset": "keydiff",
    "budget": {"tokens": 48, "floor": 1},
    "min_prompt_len": 0,
    "layer_groups": {"count": 2},
    "layer_budget": {"shape": "linear", "beta": 0.1},
}


class Watched(Loop):
    """A loop whose worker remembers what is where."""

    def __init__(self, *args: Any, setting: Any = UNEVEN, **options: Any) -> None:
        super().__init__(*args, setting=setting, **options)
        self.worker = ToldWorker(BLOCK, {}, self.random)
        self.sampled: dict[str, list[int]] = {}
        self.texts: dict[str, list[int]] = {}
        self.usable = self.pool.num_gpu_blocks - 1

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    def add(self, name: str, *args: Any, **options: Any) -> Request:
        self.worker.salts[name] = options.get("cache_salt")
        return super().add(name, *args, **options)

    def _take(self, output: Any, sampled: set[str]) -> None:
        self.sampled = {}
        super()._take(output, sampled)

    def _tokens(self, name: str, output: Any) -> list[int]:
        self.sampled[name] = super()._tokens(name, output)
        return self.sampled[name]

    def step(self) -> bool:
        goes_on = super().step()
        self.check_blocks()
        return goes_on

    def check_blocks(self) -> None:
        """Every block is free, or somebody's."""
        held = {b.block_id for m in self.scheduler._managers for b in m.held_blocks()}
        kept = {block.block_id for block in self.scheduler.reuse.kept.held_blocks()}
        assert self.pool.get_num_free_blocks() + len(held | kept) == self.usable

    def ask(
        self, name: str, text: list[int], max_tokens: int = 20, xargs: Any = None, **options: Any
    ) -> list[int]:
        """Run one request to its end, and return the text with its answer."""
        request = self.add(name, text, max_tokens, xargs, **options)
        self.run()
        return list(request.all_token_ids)

    @property
    def stats(self) -> Any:
        return self.scheduler.stats


def watch(loop: Watched) -> Watched:
    """Let the worker run what the loop takes in, in the order of the device."""
    update = loop.scheduler.update_from_output

    def run_first(output: Any, results: Any) -> Any:
        names = results.req_id_to_index
        tokens = {name: results.sampled_token_ids[index] for name, index in names.items()}
        loop.worker.run(output, {name: list(found) for name, found in tokens.items()})
        return update(output, results)

    loop.scheduler.update_from_output = run_first
    return loop
