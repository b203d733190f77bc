"""Random requests for an engine under test: prompts, options, and what becomes of each.

Everything is drawn from one random generator, so a seed stands for one course of events.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lab.places import PROBE_MODEL
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.checks import check_setting
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import check_fits_server, named_config

BLOCK_SIZE = 32
MAX_MODEL_LEN = 2048
MAX_OUTPUT = 200
SAMPLED = 0.08
"""Share of requests with a temperature: on CPU a drawn token costs as much as ten greedy ones."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
DRAFT_MODEL = {"method": "draft_model", "model": str(PROBE_MODEL), "num_speculative_tokens": 3}
"""The model drafts for itself, over a cache that is its own and whole."""
NUM_PREFIXES = 4
NUM_REMEMBERED = 12
"""Earlier prompts that may be sent again."""

FATES = (*["finish"] * 6, "prefill", "prompt_end", "decode", "any")
"""When a request is aborted; "any" may be at any step, while it waits too."""


@dataclass(frozen=True)
class Mode:
    """A way to run the engine.

    Attributes
    ----------
    setting : dict
        ``additional_config["kv_compression"]``.
    num_groups : int
        KV cache groups of the probe model under this setting.
    engine_args : dict
        Further arguments of ``vllm.LLM``.
    has_reuse : bool
        Whether requests name chats and shared prefixes.
    """

    setting: dict[str, Any]
    num_groups: int = 1
    engine_args: Mapping[str, Any] | None = None
    has_reuse: bool = False


_QUARTER = {"budget": {"ratio": 0.25}, "min_prompt_len": 128}
_LINKED = {
    "preset": "windowkv",
    "policy": {"window_size": 32, "layers_per_leader": None},
    "layer_groups": {"count": 4},
}
_DRAFT = {"mode": "draft", "draft": {"tokens": 3}}
MODES = {
    "draft-copied": Mode({"preset": "snapkv", **_QUARTER, **_DRAFT}),
    # Windows of whole blocks under one leader: views take blocks, and copy nothing.
    "draft-linked": Mode({**_LINKED, **_QUARTER, **_DRAFT}, 4),
    "ngram": Mode({"preset": "snapkv", **_QUARTER}, 1, {"speculative_config": NGRAM}),
    "draft-model": Mode(
        {
            "preset": "snapkv", **_QUARTER, "observation_window": 8, "trigger": "both",
            "interval": 16,
        },
        2, {"speculative_config": DRAFT_MODEL},
    ),
    "interval": Mode({"preset": "snapkv", **_QUARTER, "trigger": "both", "interval": 64}),
    "pressure": Mode({"preset": "snapkv", **_QUARTER, "trigger": "pressure", "interval": 64}),
    "prompt": Mode(
        {"preset": "snapkv", **_QUARTER, "trigger": "all", "prompt_interval": 96, "interval": 64}
    ),
    "shared": Mode(
        {
            "preset": "snapkv", **_QUARTER, "trigger": "all", "prompt_interval": 96,
            "interval": 64, "shared_blocks": "always",
        }
    ),
    "shared-draft": Mode(
        {
            "preset": "snapkv", "budget": {"ratio": 0.5}, "min_prompt_len": 128,
            "draft": {"tokens": 3, "budget": {"ratio": 0.25}}, "shared_blocks": "always",
        }
    ),
    "reuse": Mode(
        {
            "preset": "keydiff", **_QUARTER, "trigger": "both", "interval": 64,
            "layer_groups": {"count": 4}, "layer_budget": {"shape": "pyramid"},
        },
        4, has_reuse=True,
    ),
    "codebook": Mode({"preset": "spindlekv", "min_prompt_len": 128, "interval": 64}, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    """One request to come.

    Attributes
    ----------
    name : str
        Its id outside of the engine.
    prompt : list[int]
        Token ids.
    sampling : dict
        Arguments of ``SamplingParams``.
    fate : str
        One of `FATES`.
    """

    name: str
    prompt: list[int]
    sampling: dict[str, Any]
    fate: str

    def __str__(self) -> str:
        return f"{self.name}: {len(self.prompt)} prompt tokens, {self.sampling}, {self.fate}"


class Traffic:
    """Draws requests that the server accepts.

    Parameters
    ----------
    rng : random.Random
        What all draws come from.
    vllm_config : VllmConfig
        The engine's, against which presets are checked.
    setting : mapping
        The server's setting.
    max_output : int
        Most tokens a request generates.
    has_reuse : bool
        Whether some belong to chats, or name what they have in common with others.
    has_books : bool
        Whether some ask for codebooks.
    """

    def __init__(
        self,
        rng: random.Random,
        vllm_config: Any,
        setting: Mapping[str, Any],
        max_output: int = MAX_OUTPUT,
        has_reuse: bool = False,
        has_books: bool = True,
    ) -> None:
        server = parse_config(setting)
        assert server is not None
        self.rng, self.server, self.max_output = rng, server, max_output
        self.presets = accepted_presets(server, vllm_config, has_books)
        self.prefixes = [self._tokens(MAX_MODEL_LEN) for _ in range(NUM_PREFIXES)]
        self.earlier: list[list[int]] = []
        self.has_reuse, self.turns = has_reuse, dict[str, list[int]]()
        self.count = 0

    def arrival(self) -> Arrival:
        """The next request."""
        rng = self.rng
        prompt = self._prompt()
        xargs = self._xargs(len(prompt))
        if self.has_reuse and rng.random() < 0.6:
            prompt, xargs = self._reused()
        few, many = min(40, self.max_output), self.max_output
        num_output = rng.choice([1, rng.randint(2, few), *[rng.randint(few, many)] * 3])
        sampling: dict[str, Any] = {"max_tokens": num_output, "temperature": 0.0, "n": 1}
        if rng.random() < SAMPLED:
            # Without a seed of its own a request draws from a generator that all share.
            sampling |= {"temperature": 1.0, "seed": rng.randrange(2**31)}
            sampling |= {"n": rng.choice([1, 2, 3]), "max_tokens": min(num_output, 24)}
        sampling |= {"ignore_eos": True, "extra_args": xargs or None}
        self.count += 1
        return Arrival(f"load-{self.count}", prompt, sampling, rng.choice(FATES))

    # --- prompts --------------------------------------------------------------------------

    def _length(self) -> int:
        """Whole blocks, one token more, or anything; up to what leaves room for the output."""
        rng = self.rng
        most = (MAX_MODEL_LEN - MAX_OUTPUT) // BLOCK_SIZE - 1
        blocks = rng.choice([rng.randint(1, 8), rng.randint(4, 32), rng.randint(24, most)])
        return blocks * BLOCK_SIZE + rng.choice([0, 0, 1, 1, rng.randrange(BLOCK_SIZE)])

    def _tokens(self, length: int) -> list[int]:
        """Random tokens; half the time of few kinds, so that n-grams come back."""
        kinds = self.rng.choice([6, 3000])
        first = self.rng.randrange(3, 900)
        return [first + self.rng.randrange(kinds) for _ in range(length)]

    def _prompt(self) -> list[int]:
        rng, length = self.rng, self._length()
        kind = rng.choice(["fresh", "again", "prefix", "prefix"])
        if kind == "again" and self.earlier:
            return list(rng.choice(self.earlier))
        prompt = self._tokens(length)
        if kind == "prefix":
            shared = rng.choice([length, length - 1, rng.randint(1, length), length // 2])
            prompt[:shared] = rng.choice(self.prefixes)[:shared]
        self.earlier = [*self.earlier[1 - NUM_REMEMBERED :], prompt]
        return prompt

    def _reused(self) -> tuple[list[int], dict[str, Any]]:
        """The next turn of a chat, or a question about a text that others ask about, too."""
        rng = self.rng
        if rng.random() < 0.5:
            which = rng.randrange(2)
            text = self.prefixes[which][: 330 + 100 * which]
            return [*text, *self._tokens(rng.randint(1, 60))], {"kv_shared_prefix": len(text)}
        name = rng.choice("abc")
        # What was answered is not known here: the next turn goes on from the question.
        text = [*self.turns.get(name, []), *self._tokens(rng.choice([5, 100, 300]))]
        if len(text) > MAX_MODEL_LEN // 2:
            text = self._tokens(200)
        self.turns[name] = text
        return text, {"kv_session": name}

    # --- options --------------------------------------------------------------------------

    def _xargs(self, prompt_len: int) -> dict[str, Any]:
        rng, xargs = self.rng, dict[str, Any]()
        if rng.random() < 0.6:
            without, reading = self.presets
            xargs["kv_compression"] = rng.choice([*without, *without, *reading, "none"])
        budget = rng.random()
        if budget < 0.2:
            xargs["kv_budget_ratio"] = rng.choice([0.05, 0.25, 0.5, 0.9, 1.0])
        elif budget < 0.4:
            xargs["kv_budget_tokens"] = rng.choice([1, 64, 200, 1024, 4096])
        if rng.random() < 0.2:
            start = rng.randrange(prompt_len)
            xargs["kv_pin"] = [start, min(start + rng.choice([1, 40, 400]), prompt_len)]
        if self.server.mode == "draft" and rng.random() < 0.4:
            xargs["kv_draft_tokens"] = rng.randint(0, self.server.draft.tokens)
        named = named_config(self.server, RequestOptions(preset=xargs.get("kv_compression")))
        if named is not None and named.tasks and rng.random() < 0.5:
            xargs["kv_task"] = rng.choice(["auto", "localization", "aggregation"])
        return xargs


def accepted_presets(
    server: CompressionConfig, vllm_config: Any, has_books: bool
) -> tuple[Sequence[str], Sequence[str]]:
    """Presets that requests to this server may name: those that read no queries, and others."""
    without: list[str] = []
    reading: list[str] = []
    for name in preset_names():
        options = RequestOptions(preset=name)
        try:
            check_fits_server(server, options)
            named = named_config(server, options)
            assert named is not None
            check_setting(named, vllm_config)
        except ConfigError:
            continue
        if named.codebook is not None and not has_books:
            continue
        reads = named.build_policy().queries.value != "none"
        (reading if reads else without).append(name)
    return without, reading
