"""Requests of an engine whose cache is marked (lab/row_marks.py), looked at in every step."""

from zlib import crc32

import torch

from lab import random_load
from vllm_kvcompress.evaluation.engine import Engine

BLOCK, LENGTH, NUM_TOKENS = 32, 413, 6
"""Tokens of a block, and of a prompt and an answer that ends in another block."""


def ask(run: random_load.Run, engine: Engine, name: str, num_tokens: int = NUM_TOKENS) -> None:
    """One request that is compacted, or drafts; raises `LoadError` if it reads a wrong row."""
    rng = torch.Generator().manual_seed(crc32(name.encode()))  # else it may be another's, cached
    prompt = torch.randint(3, 900, (LENGTH,), generator=rng).tolist()
    engine.add(name, prompt, num_tokens, ignore_eos=True)
    assert run.marks is not None
    try:
        while engine.engine.has_unfinished_requests():
            engine.step()
            run.marks.check()
    finally:
        while engine.engine.has_unfinished_requests():
            engine.step()
        run.marks.failures.clear()
