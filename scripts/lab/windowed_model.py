"""A real model with windowed layers: answers over HTTP, blocks by group, and perplexity.

    python scripts/windowed_model.py serve MODEL --out FOLDER     # completions.csv
    python scripts/windowed_model.py read MODEL --out FOLDER      # blocks.csv and perplexity.csv

`serve` asks two servers, stock vLLM and ``vllm serve MODEL --kv-compression snapkv``, the same
prompts of 3,000 tokens: greedy completions are equal where nothing is evicted, at the ratio 1 and
with ``kv_compression: none``. At 25 % they are those of transformers over the same survivors.
`read` steps an engine in this process: the blocks of every KV cache group before and after a prompt
is compressed to 25 %, and the perplexity of the 200 tokens that follow each text at several ratios,
beside that of transformers over the same survivors. vLLM is made to say the text (its trace
replay), so both read the same tokens.

The texts are pages of this repository's documentation; the files say which, by their digest.
Exits with 1 where these differ or perplexities are further apart than 1 %.
"""

import argparse
import csv
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from lab.demo.command import shown_log
from lab.demo.metrics import parse_metrics, total
from lab.errors import RunError
from lab.places import LOGS, ROOT
from lab.servers import free_port, running_server, wait_until_ready
from vllm_kvcompress.evaluation.provenance import versions

PRESET = "snapkv"
PROMPT_TOKENS, SHARED_TOKENS, ANSWER_TOKENS, READ_TOKENS = 3000, 2600, 16, 200
NUM_PROMPTS, BLOCK_SIZE, START_LIMIT = 20, 32, 900
Answers = list[list[int]]
RATIOS = (1.0, 0.5, 0.25, 0.12)
PAGES = ("benchmarks/speculation", "performance", "benchmarks/policies", "kernels")
TOLERANCE = 0.01
"""Of a perplexity: rounding of two engines in float32, and text that is near ties."""


class Text:
    """A page of the documentation as tokens."""

    def __init__(self, page: str, tokenizer: Any) -> None:
        content = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        self.page, self.tokens = page, tokenizer.encode(content)
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        if len(self.tokens) < PROMPT_TOKENS + READ_TOKENS:
            raise RunError(f"docs/{page}.md has {len(self.tokens)} tokens only.")


def load_texts(model: Path) -> list[Text]:
    """All pages."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [Text(page, tokenizer) for page in PAGES]


def make_prompts(texts: Sequence[Text]) -> list[list[int]]:
    """Prompts of one length that begin alike and end differently, so that most of each is a hit."""
    first, *others = texts
    ends = [token for text in others for token in text.tokens]
    size = PROMPT_TOKENS - SHARED_TOKENS
    starts = range(0, NUM_PROMPTS * size, size)
    prompts = [first.tokens[:SHARED_TOKENS] + ends[start : start + size] for start in starts]
    if len(prompts[-1]) < PROMPT_TOKENS:
        raise RunError("the pages are too short for so many prompts.")
    return prompts


def write_rows(path: Path, about: dict[str, Any], header: str, rows: Iterable[tuple]) -> None:
    """A CSV whose first line says where its numbers come from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write("# " + json.dumps(about) + "\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split())
        writer.writerows(rows)


# --- over HTTP ----------------------------------------------------------------------------


def completions(
    model: Path, options: list[str], prompts: list[list[int]], variants: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, Answers, float]]:
    """Of each variant its name, the server's answers, and the blocks that the pool got back.

    Prompts that are compacted are asked one by one: of requests that hold the same blocks at a time
    only some are, and which depends on all of them.
    """
    port, log = free_port(), LOGS / "windowed.log"
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", str(model), *options,
        "--served-model-name", "model", "--port", str(port), "--max-model-len", "4096",
        "--max-num-seqs", str(NUM_PROMPTS), "--dtype", "float32", "--enforce-eager",
        "--block-size", str(BLOCK_SIZE), "--kv-cache-memory-bytes", str(512 << 20),
    ]  # fmt: skip
    print("starting:", shlex.join(command), flush=True)
    with running_server(command, log) as process, shown_log(log):
        wait_until_ready(process, url, log, lambda *_: None, START_LIMIT)
        http = httpx.Client(base_url=url, timeout=3600)
        before = returned_blocks(http)
        for name, xargs in variants.items():
            answers = []
            together = [prompts[:1], prompts[1:]]  # what they share is computed by the first
            one_by_one = [[prompt] for prompt in prompts]
            for batch in one_by_one if xargs.get("kv_budget_ratio", 1) < 1 else together:
                body: dict[str, Any] = {"model": "model", "prompt": batch, "temperature": 0}
                body |= {"max_tokens": ANSWER_TOKENS, "ignore_eos": True}
                body |= {"return_token_ids": True}
                body |= {"vllm_xargs": xargs} if xargs else {}
                reply = http.post("/v1/completions", json=body)
                if reply.is_error:
                    raise RunError(f"HTTP {reply.status_code}: {reply.text[:300]}")
                answers += [choice["token_ids"] for choice in reply.json()["choices"]]
                print(f"{name}: {len(answers)} of {len(prompts)}", flush=True)
            after = returned_blocks(http)
            yield name, answers, after - before
            before = after


def returned_blocks(http: httpx.Client) -> float:
    """Blocks that compactions have given back so far."""
    samples = parse_metrics(http.get("/metrics").text)
    return total(samples, "vllm:kv_compression_blocks_returned_total")


def serve(args: argparse.Namespace) -> bool:
    """Compare completions with stock vLLM's, and those at 25 % with transformers'."""
    texts = load_texts(args.model)
    prompts = make_prompts(texts)[: args.prompts]
    _, stock, _ = next(completions(args.model, [], prompts, {"stock": {}}))
    variants: dict[str, dict[str, Any]] = {
        "none": {"kv_compression": "none"},
        "1.0": {"kv_budget_ratio": 1.0},
        "0.25": {"kv_budget_ratio": 0.25},
    }
    found = list(completions(args.model, ["--kv-compression", PRESET], prompts, variants))
    kept = replayed_answers(args.model, prompts, 0.25)
    rows, good = [], True
    for name, answers, returned in found:
        is_whole = name != "0.25"
        equal, to_replay = count_equal(answers, stock), count_equal(answers, kept)
        rows.append(
            (name, len(prompts), PROMPT_TOKENS, equal, "" if is_whole else to_replay, int(returned))
        )
        print(*rows[-1], flush=True)
        good &= (equal if is_whole else to_replay) == len(prompts)
        good &= (returned == 0) == is_whole
    about = {**about_run(args, texts), "preset": PRESET, "answer_tokens": ANSWER_TOKENS}
    header = "setting prompts prompt_tokens equal_to_stock equal_to_transformers blocks_returned"
    write_rows(args.out / "completions.csv", about, header, rows)
    return good


def count_equal(answers: Answers, others: Answers) -> int:
    """Answers that are the other's."""
    return sum(one == other for one, other in zip(answers, others, strict=True))


def replayed_answers(model: Path, prompts: Sequence[list[int]], ratio: float) -> Answers:
    """What transformers say over what the same code keeps."""
    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.evaluation.replay import Replay

    replay, found = Replay(str(model), BLOCK_SIZE), []
    config = parse_config({"preset": PRESET, "budget": {"ratio": ratio}})
    for prompt in prompts:
        found.append(replay.generate(replay.prefill(prompt), config, ANSWER_TOKENS))
        print(f"transformers: {len(found)} of {len(prompts)}", flush=True)
    return found


def about_run(args: argparse.Namespace, texts: Sequence[Text]) -> dict[str, Any]:
    """What the first line of a file says."""
    command = f"python scripts/windowed_model.py {args.action} MODEL --out FOLDER"
    pages = {text.page: text.digest for text in texts}
    return {"command": command, "model": args.model.name, "pages": pages, **versions()}


# --- in this process ----------------------------------------------------------------------


def held_blocks(engine: Any, name: str) -> dict[str, int]:
    """Blocks of a request by KV cache group."""
    request_id = engine.live()[name].request_id
    managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
    found = {}
    for number, manager in enumerate(managers):
        kind = type(manager.kv_cache_spec).__name__
        blocks = manager.req_to_blocks[request_id]
        found[f"{number} {kind}"] = sum(not block.is_null for block in blocks)
    return found


def blocks_of_groups(engine: Any, prompt: list[int]) -> list[tuple[str, int, int]]:
    """Of each group the blocks of a prompt that is kept whole, and of one at 25 %."""
    samples: dict[str, dict[str, int]] = {}
    for name, xargs in (("whole", {"kv_compression": "none"}), ("kept", {"kv_budget_ratio": 0.25})):
        engine.add(name, prompt, 3, xargs, ignore_eos=True)
        while len(engine.results[name].token_ids) < 2:
            engine.step()
        samples[name] = held_blocks(engine, name)
        engine.drain()
    return [(group, samples["whole"][group], kept) for group, kept in samples["kept"].items()]


def engine_losses(engine: Any, texts: Sequence[Text]) -> dict[float, list[float]]:
    """By ratio, the mean negative log-likelihood of what follows each text.

    The first token is left out: the prompt's own pass says it, from the whole cache. Requests of
    the first ratio compute the prompts, all others find them in the prefix cache.
    """
    from vllm import SamplingParams

    by_name = {f"{text.page}-{ratio}": text for ratio in RATIOS for text in texts}
    losses: dict[str, list[float]] = {name: [] for name in by_name}
    with recorded(engine.runner.sampler, by_name, losses):
        for ratio in RATIOS:
            for text in texts:
                params = SamplingParams(
                    temperature=0, max_tokens=READ_TOKENS,
                    trace_decode_token_ids=text.tokens[PROMPT_TOKENS:][:READ_TOKENS],
                    extra_args={"kv_budget_ratio": ratio},
                )  # fmt: skip
                prompt = {"prompt_token_ids": text.tokens[:PROMPT_TOKENS]}
                engine.engine.add_request(f"{text.page}-{ratio}", prompt, params)
            # To the end before the next ratio: of requests that hold the same blocks at a time none
            # is compacted.
            while engine.engine.has_unfinished_requests():
                engine.engine.step()
    assert all(len(found) == READ_TOKENS - 1 for found in losses.values())
    return {ratio: [mean(losses[f"{text.page}-{ratio}"]) for text in texts] for ratio in RATIOS}


@contextmanager
def recorded(
    sampler: Any, texts: dict[str, Text], losses: dict[str, list[float]]
) -> Iterator[None]:
    """Note the loss of each text's next token as the sampler is handed its logits.

    vLLM's own log-probabilities would be the same; on a CPU its kernel for them takes most of the
    time, in Triton's interpreter.
    """
    own = type(sampler)

    def call(self: Any, logits: Any, batch: Any) -> Any:
        ahead = (batch.positions[batch.logits_indices] + 1).tolist()
        for row, (request_id, place) in enumerate(zip(batch.req_ids, ahead, strict=True)):
            name = request_id.rsplit("-", 1)[0]  # vLLM appends to it
            if name in texts and place > PROMPT_TOKENS:
                token = texts[name].tokens[place]
                losses[name].append(-float(logits[row].float().log_softmax(-1)[token]))
        return own.__call__(self, logits, batch)

    sampler.__class__ = type("RecordingSampler", (own,), {"__call__": call})
    try:
        yield
    finally:
        sampler.__class__ = own


def replay_losses(replay: Any, text: Text, ratios: Sequence[float]) -> list[float]:
    """The same by transformers, over what the same code keeps."""
    import torch

    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.evaluation.replay_batch import ReplayBatch

    prefilled = replay.prefill(text.tokens[:PROMPT_TOKENS])
    tokens = torch.tensor([text.tokens[PROMPT_TOKENS : PROMPT_TOKENS + READ_TOKENS]])
    losses = []
    for ratio in ratios:
        config = parse_config({"preset": PRESET, "budget": {"ratio": ratio}})
        rows = replay.rows(prefilled, config if ratio < 1 else None)[0]
        logits = ReplayBatch(replay, [rows], PROMPT_TOKENS).extend(tokens[:, :-1])
        found = logits[0].float().log_softmax(-1).gather(1, tokens[0, 1:, None])
        losses.append(-float(found.mean()))
    return losses


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


def read(args: argparse.Namespace) -> bool:
    """Blocks by group, and perplexities of both engines."""
    from vllm_kvcompress.evaluation.engine import Engine
    from vllm_kvcompress.evaluation.replay import Replay

    texts = load_texts(args.model)[: args.texts]
    about = {**about_run(args, texts), "preset": PRESET}
    engine = Engine(
        str(args.model), PRESET, max_model_len=4096, block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=512 << 20, enable_trace_replay=True,
    )  # fmt: skip
    blocks = blocks_of_groups(engine, texts[0].tokens[:PROMPT_TOKENS])
    write_rows(args.out / "blocks.csv", about, "group blocks_before blocks_after", blocks)
    for row in blocks:
        print(*row, flush=True)
    ours = engine_losses(engine, texts)
    print(f"vLLM: {ours}", flush=True)
    engine.close()
    replay = Replay(str(args.model), BLOCK_SIZE)
    theirs = [replay_losses(replay, text, RATIOS) for text in texts]
    rows, good = [], True
    for index, ratio in enumerate(RATIOS):
        pairs = [
            (text.page, ours[ratio][number], theirs[number][index])
            for number, text in enumerate(texts)
        ]
        pairs.append(("all", mean(ours[ratio]), mean([each[index] for each in theirs])))
        for page, one, other in pairs:
            rows.append((page, ratio, f"{math.exp(one):.4f}", f"{math.exp(other):.4f}"))
            good &= abs(one - other) < TOLERANCE
            print(*rows[-1], flush=True)
    header = "text ratio perplexity_vllm perplexity_transformers"
    write_rows(args.out / "perplexity.csv", about, header, rows)
    return good


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure a model with windowed layers.")
    parser.add_argument("action", choices=["serve", "read"])
    parser.add_argument("model", type=Path, help="folder of the model, e.g. of Gemma 3 270M")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="of serve; default: 20")
    parser.add_argument("--texts", type=int, default=len(PAGES), help="of read; default: 4")
    return parser.parse_args(argv)


def main() -> int:
    """Entry point."""
    args = parse_args()
    try:
        return 0 if {"serve": serve, "read": read}[args.action](args) else 1
    except RunError as error:
        print(f"windowed_model: {error}", file=sys.stderr)
        return 1
