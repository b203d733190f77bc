"""Passes of the model itself: a prompt, a decode step, a verify pass.

Counted are matrices, keys and values, and what tensor-parallel ranks exchange. Activations, norms,
block tables, sampling and the host's own work are left out.
"""

from vllm_kvcompress.speed.paths import Path, Stage
from vllm_kvcompress.speed.shapes import ModelShape

CHUNK_TOKENS = 8192
"""Tokens of a prompt per step where nothing else is said: vLLM's default on large GPUs."""

LAYER_LAUNCHES = 10
"""Of a layer outside CUDA graphs, an estimate: two norms, query-key-value projection, rotary
embedding, cache write, attention, output projection, two products of the MLP, its activation.
vLLM's compiler fuses some of them, and backends split others."""


def prefill(
    shape: ModelShape, prompt_len: int, batch: int = 1, chunk_tokens: int = CHUNK_TOKENS
) -> Path:
    """Prompts from their first token to their last, with causal attention.

    A chunk reads the weights, and for every request its keys and values so far.
    """
    chunks = -(-batch * prompt_len // chunk_tokens)
    tokens, pairs = batch * prompt_len, batch * prompt_len * (prompt_len + 1) // 2
    own = -(-prompt_len // chunk_tokens)
    seen = sum(min((index + 1) * chunk_tokens, prompt_len) for index in range(own))
    logits = 2 * shape.num_head_weights * batch  # of each prompt's last token
    matrices = Stage(
        "matrices",
        read=chunks * shape.pass_weight_bytes,
        flops=2 * shape.num_layer_weights * tokens + logits,
        launches=chunks * (shape.num_layers * (LAYER_LAUNCHES - 1) + 1),
        link_bytes=shape.link_bytes(tokens),
    )
    attention = Stage(
        "attention",
        read=batch * seen * shape.kv_token_bytes,
        written=tokens * shape.kv_token_bytes,
        flops=shape.attention_flops * pairs,
        launches=chunks * shape.num_layers,
    )
    return Path((matrices, attention))


def decode_step(
    shape: ModelShape,
    batch: int,
    slots: float,
    queries: int = 1,
    attended: float | None = None,
    launches: int = 1,
) -> Path:
    """One step of `queries` tokens per request, each of which attends to the cache.

    Parameters
    ----------
    shape : ModelShape
        The model, or one worker's part.
    batch : int
        Requests.
    slots : float
        Slots of the cache that a request's step reads, mean over layers; once for all queries.
    queries : int
        Tokens per request: 1, or k + 1 where k drafts are verified.
    attended : float, optional
        Tokens that the slots stand for, where codebooks make that more.
    launches : int
        Of the step; the model is one, a CUDA graph.
    """
    tokens = batch * queries
    matrices = Stage(
        "matrices",
        read=shape.pass_weight_bytes,
        flops=2 * shape.num_step_weights * tokens,
        launches=launches,
        link_bytes=shape.link_bytes(tokens),
    )
    attention = Stage(
        "attention",
        read=batch * slots * shape.kv_token_bytes,
        written=tokens * shape.kv_token_bytes,
        flops=shape.attention_flops * tokens * (slots if attended is None else attended),
    )
    return Path((matrices, attention))
