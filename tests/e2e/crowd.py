"""What every kind of model goes through: requests of all lengths at once in too small a pool."""

from typing import Any

from lab.random_models import distinct_tokens
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Replay

UNCOMPRESSED = {"kv_compression": "none"}
CHUNK = 160
"""Tokens of a step of the engines that are tested so."""
PLAIN = {"uncompressed": 350, "uncompressed, too": 349}
"""First in the queue: they fill the pool, and grow."""
ENDS = {
    **PLAIN,
    "below the least length": 40,
    "hardly longer": 65,
    "whole": 340,
    "a last chunk of one token": 3 * CHUNK + 1,
}
ABORTED = {"in its prompt": 500, "at its compaction": 450, "while decoding": 320}


def check_crowd(
    engine: Engine, replay: Replay, setting: dict[str, Any], num_tokens: int = 48
) -> None:
    """Aborts, preemptions and neighbours change nobody's tokens, which are those of transformers.

    Parameters
    ----------
    engine : Engine
        Idle, under `setting`, with `CHUNK` tokens a step.
    replay : Replay
        Of its model.
    setting : dict
        Of which prompts of 40 tokens are too short.
    num_tokens : int
        To generate, each request.
    """
    lengths = {**ENDS, **ABORTED}
    prompts = {
        name: distinct_tokens(length, seed=40 + number)
        for number, (name, length) in enumerate(lengths.items())
    }
    most = _blocks_of(engine, distinct_tokens(PLAIN["uncompressed"], seed=39))
    taken = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - 2 * most - 1)
    preemptions = engine.num_preemptions
    for name, tokens in prompts.items():
        xargs = UNCOMPRESSED if name in PLAIN else None
        engine.add(name, tokens, num_tokens, xargs, ignore_eos=True)
    aborted = set()
    while engine.engine.has_unfinished_requests():
        engine.step()
        engine.scheduler.check_integrity()
        for name, request in engine.live().items():
            where = {
                "in its prompt": 0 < request.num_computed_tokens < request.num_prompt_tokens,
                "at its compaction": engine.scheduler.compactions.is_planned(request.request_id),
                "while decoding": request.num_output_tokens > 2,
            }
            if where.get(name):
                engine.abort(name)
                aborted.add(name)
    assert aborted == ABORTED.keys()
    assert engine.num_preemptions > preemptions, "the pool was too large"
    engine.pool.free_blocks(taken)
    for name in ENDS:
        is_plain = name in (*PLAIN, "below the least length")
        config = None if is_plain else parse_config(setting)
        expected = replay.generate(replay.prefill(prompts[name]), config, num_tokens)
        assert engine.results[name].token_ids == expected, name


def _blocks_of(engine: Engine, tokens: list[int]) -> int:
    """Blocks that an uncompressed prompt holds at its end."""
    engine.add("measured", tokens, 3, UNCOMPRESSED, ignore_eos=True)
    fewest = engine.pool.get_num_free_blocks()
    while engine.engine.has_unfinished_requests():
        engine.step()
        fewest = min(fewest, engine.pool.get_num_free_blocks())
    return engine.num_usable_blocks - fewest
