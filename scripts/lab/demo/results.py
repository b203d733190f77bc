"""What a question cost, as a row, a table, sentences and JSON."""

import argparse
import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from lab.demo.client import Client
from lab.demo.metrics import block_bytes, kept_per_group, total
from lab.demo.questions import Question
from lab.servers import has_nvidia_gpu


@dataclass(frozen=True)
class Row:
    """One question and what it cost.

    Parameters
    ----------
    endpoint : str
        "completions" or "chat".
    prompt_tokens : int
        As the server counts them.
    depth : float
        Where the number is hidden: 0 at the beginning, 1 at the end.
    expected, answer : str
        The hidden number, and the first number in the model's text ("" if there is none).
    kept : list[int]
        Prompt tokens kept in every layer group.
    blocks_freed : int
        Blocks the compaction gave back to the pool.
    held_compressed, held_uncompressed : int
        Blocks held when decoding the same prompt begins, with compression and without.
    """

    endpoint: str
    prompt_tokens: int
    depth: float
    expected: str
    answer: str
    kept: list[int]
    blocks_freed: int
    held_compressed: int
    held_uncompressed: int

    @property
    def right(self) -> bool:
        """Whether the hidden number came back."""
        return self.answer == self.expected

    @property
    def passed(self) -> bool:
        """Right, and really compressed."""
        return self.right and self.blocks_freed > 0


def first_number(text: str) -> str:
    """The first run of digits in a text, "" if there is none."""
    found = re.search(r"\d+", text)
    return found.group() if found else ""


def measure(client: Client, question: Question) -> Row:
    """Ask one question, then decode its prompt twice more to see what it holds."""
    endpoint, prompt = question.endpoint, question.prompt
    before = client.metrics()
    text, prompt_tokens = client.ask(endpoint, prompt)
    after = client.metrics()
    returned = "vllm:kv_compression_blocks_returned_total"
    taken = "vllm:kv_compression_blocks_taken_total"
    freed = total(after, returned) - total(before, returned)
    freed -= total(after, taken) - total(before, taken)
    # The repeats find the prompt in the prefix cache. That saves time, not blocks: cached blocks
    # that a running request uses count as held like any others.
    compressed = client.held(endpoint, prompt)
    uncompressed = client.held(endpoint, prompt, vllm_xargs={"kv_compression": "none"})
    return Row(
        endpoint=endpoint,
        prompt_tokens=prompt_tokens,
        depth=question.depth,
        expected=question.answer,
        answer=first_number(text),
        kept=kept_per_group(before, after, prompt_tokens),
        blocks_freed=round(freed),
        # Decoding only adds blocks, so the least reading is the one nearest to the prompt's end;
        # at the first token a compressed request still has what the next step gives back.
        held_compressed=min(compressed),
        held_uncompressed=min(uncompressed),
    )


def describe_kept(kept: list[int]) -> str:
    """Tokens kept per layer group, short where all groups keep the same."""
    if len(kept) > 1 and len(set(kept)) == 1:
        return f"{len(kept)} x {kept[0]}"
    return " ".join(map(str, kept)) or "-"


def make_table(rows: list[Row]) -> Table:
    """The table for people."""
    table = Table(title="Numbers hidden in long prompts")
    left = ("endpoint", "prompt\ntokens", "depth", "hidden\nnumber", "answer", "")
    right = ("tokens kept per\nlayer group", "blocks\nfreed", "blocks held\nwhile decoding")
    for header in (*left, *right):
        table.add_column(header, justify="left" if header == "endpoint" else "right")
    for row in rows:
        table.add_row(
            row.endpoint,
            str(row.prompt_tokens),
            f"{row.depth:.2f}",
            row.expected,
            row.answer or "none",
            "[green]right[/]" if row.right else "[red]wrong[/]",
            describe_kept(row.kept),
            str(row.blocks_freed),
            f"{row.held_uncompressed} -> {row.held_compressed}",
        )
    return table


def summary(rows: list[Row], bytes_per_block: float) -> list[str]:
    """What the table means, as sentences."""
    mean_mebibytes = bytes_per_block / len(rows) / 2**20
    without = sum(row.held_uncompressed for row in rows) * mean_mebibytes
    compressed = sum(row.held_compressed for row in rows) * mean_mebibytes
    lines = [
        f"{sum(row.right for row in rows)} of {len(rows)} answers are right.",
        f"While decoding, a request held {without:.1f} MiB of KV cache without compression and "
        f"{compressed:.1f} MiB with it (mean).",
        "(Until its prompt ends a request holds all of it; then, for one step, also the copy of "
        "what it keeps.)",
    ]
    idle = [number for number, row in enumerate(rows, 1) if row.blocks_freed <= 0]
    if idle:
        lines.append(f"Compression freed no blocks for: row {', '.join(map(str, idle))}.")
    return lines


def results_json(args: argparse.Namespace, client: Client, rows: list[Row]) -> dict[str, Any]:
    """Everything measured, JSON-ready."""
    return {
        "model": args.model,
        "preset": args.preset,
        "vllm": client.version(),
        "device": "cuda" if has_nvidia_gpu() else "cpu",
        "block_bytes": block_bytes(client.metrics()),
        "rows": [{**asdict(row), "right": row.right} for row in rows],
        "passed": all(row.passed for row in rows),
    }
