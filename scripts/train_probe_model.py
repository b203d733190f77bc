"""Train a small Llama that finds the one seven-digit number hidden in a text.

The model is a test instrument: small enough for two CPU cores, and yet it retrieves, so exact
answers before and after compressing its cache show what the compression costs. Four stages:

1. Dense key-value sequences teach it to copy digits; documents alone do so far too slowly.
2. Short documents with many numbers teach it the prompt format.
3. Documents with one number that grow from 512 to 4,096 tokens teach it distance.
4. The three longest lengths once more, at a lower learning rate.

    python scripts/train_probe_model.py --out my-probe
    python scripts/train_probe_model.py --resume my-probe --eval-only
"""

import argparse
import ast
import copy
import json
import math
import platform
import random
import re
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
NEEDLE = "One of the special magic numbers for {key} is: {number}."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]  # ids 0, 1, 2
NUM_DIGITS = 7
ADJECTIVES = (
    "able bold brave brief bright calm clever cosy curly dusty eager fancy gentle giant golden "
    "happy humble jolly lively lonely lucky mighty modest noble proud quick quiet rare rusty shiny "
    "simple sleepy smooth steady stormy strong sunny swift tiny vivid"
)
NOUNS = (
    "acorn anchor apple arrow badger basket beacon bridge camel candle castle cedar comet copper "
    "desert dolphin eagle ember falcon fern fox garden hammer heron island jacket kettle lantern "
    "lemon maple meadow mirror ocean olive orchid otter owl pebble piano pillow planet raven "
    "river rocket saddle shadow spider temple tiger tulip valley violin walnut willow zebra"
)
KEYS = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]

IGNORE, TEXT, ANSWER = 0, 1, 2  # role of a token: no loss, small weight, full weight

# Shape of the model; every entry is a field of LlamaConfig and a command-line option.
ARCHITECTURE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Phase:
    """One row of the training table.

    Parameters
    ----------
    stage : int
        Stage of the recipe the row belongs to; ``--stages`` selects by it.
    kind : str
        ``dense`` (key-value pairs), ``many`` (documents with 2 to 5 numbers) or ``single``
        (documents with one number, 15 % with two or three).
    length, batch, steps : int
        Longest sequence in tokens, sequences per step, optimiser steps.
    lr : float
        Peak learning rate; every phase warms up, then follows a cosine to a tenth.
    dense_share : float
        Share of the steps that use a batch of the first phase instead.
    """

    stage: int
    kind: str
    length: int
    batch: int
    steps: int
    lr: float
    dense_share: float = 0.0


PHASES = (
    Phase(1, "dense", 96, 24, 600, 2e-3),
    Phase(2, "many", 256, 24, 2000, 1.5e-3, dense_share=0.5),
    Phase(3, "single", 512, 4, 600, 1e-3),
    Phase(3, "single", 1024, 4, 500, 1e-3),
    Phase(3, "single", 2048, 2, 400, 1e-3),
    Phase(3, "single", 4096, 1, 350, 1e-3),
    Phase(4, "single", 1024, 4, 480, 6e-4),
    Phase(4, "single", 2048, 2, 480, 6e-4),
    Phase(4, "single", 4096, 1, 480, 6e-4),
)


def docstring_sentences(max_files: int | None = None) -> list[str]:
    """Return the distinct English sentences in the standard library's docstrings, in file order.

    Sentences with three or more digits in a row are left out, so that nothing but the hidden
    number looks like one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
    files = [p for p in sorted(root.rglob("*.py")) if not skipped & set(p.relative_to(root).parts)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    sentences: dict[str, None] = {}
    for path in files[:max_files]:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join((text or "").split())):
                if re.fullmatch(r"[A-Z](?!.*\d{3})[ -~]{28,238}[.!?]", sentence):
                    sentences[sentence] = None
    return list(sentences)


def train_tokenizer(sentences: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer in which every digit is a token of its own."""
    prompts = [
        "\n".join([HEADER, NOISE, f"{NEEDLE} {NEEDLE}", QUESTION]).format(key=key, number=7)
        for key in KEYS
    ]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{s} {s}" for s in sentences] + prompts, trainer)
    bos = SPECIAL_TOKENS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class TextSource:
    """Draws training sequences and prompts from one stream of random numbers.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        Tokenizer with one token per digit.
    sentences : list of str
        Filler for the documents; half of the documents use the noise line instead.
    seed : int
        Seed of the stream; training and held-out sources use different ones.
    """

    def __init__(self, tokenizer: Any, sentences: list[str], seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.sentences = [(s, self._size(" " + s)) for s in sentences]
        self.noise = [(NOISE, self._size(" " + NOISE))]
        self.digits = [tokenizer.convert_tokens_to_ids(str(d)) for d in range(10)]
        self.space, self.dot = tokenizer.convert_tokens_to_ids(["Ġ", "."])
        reserved = {self.space, self.dot, *self.digits}
        self.words = [i for i in range(len(SPECIAL_TOKENS), len(tokenizer)) if i not in reserved]

    def _size(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def dense(self, length: int) -> tuple[list[int], list[int]]:
        """Return ids and roles of random key-value pairs followed by the same pairs, shuffled."""
        rng, pairs, size = self.rng, [], 1
        while True:
            key = [rng.choice(self.words) for _ in range(rng.randint(1, 3))]
            value = [rng.choice(self.digits) for _ in range(rng.randint(3, NUM_DIGITS))]
            size += 2 * (len(key) + len(value) + 2)
            if size > length:
                break
            pairs.append((key, value))
        ids, roles = [self.tokenizer.bos_token_id], [IGNORE]
        repeated = rng.sample(pairs, len(pairs))
        for role, group in ((IGNORE, pairs), (ANSWER, repeated)):
            for key, value in group:
                ids += [*key, self.space, *value, self.dot]
                roles += [IGNORE] * (len(key) + 1) + [role] * len(value) + [IGNORE]
        return ids, roles

    def document(
        self, length: int, num_numbers: int = 1, num_questions: int = 1, noise: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a text of at most `length` tokens and the character span of every answer.

        An answer is the space and the digits after the question: the space has to be learnt like
        the digits, and among thousands of TEXT tokens it would weigh next to nothing.
        """
        rng = self.rng
        keys = rng.sample(KEYS, num_numbers)
        numbers = [str(rng.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)) for _ in keys]
        needles = [NEEDLE.format(key=k, number=n) for k, n in zip(keys, numbers, strict=True)]
        asked = rng.sample(range(num_numbers), num_questions)
        tail = [f"{QUESTION.format(key=keys[i])} {numbers[i]}." for i in asked]
        room = length - 1 - self._size("\n".join([HEADER, " ".join(needles), *tail]))
        body: list[str] = []
        sentence, size = rng.choice(self.noise if noise else self.sentences)
        while size <= room:
            body.append(sentence)
            room -= size
            sentence, size = rng.choice(self.noise if noise else self.sentences)
        for needle in needles:
            body.insert(rng.randint(0, len(body)), needle)
        text, spans = f"{HEADER}\n{' '.join(body)}", []
        for line in tail:
            text += "\n" + line
            spans.append((len(text) - 2 - NUM_DIGITS, len(text) - 1))
        return text, spans

    def encode(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """Tokenise a document; the tokens inside the spans get the role ANSWER."""
        encoding = self.tokenizer(text)
        roles = [IGNORE] + [TEXT] * (len(encoding.input_ids) - 1)
        for start, end in spans:
            for char in range(start, end):
                roles[encoding.char_to_token(char)] = ANSWER
        return encoding.input_ids, roles

    def sequence(self, kind: str, length: int) -> tuple[list[int], list[int]]:
        """Return ids and roles of one sequence of the given phase kind."""
        rng = self.rng
        if kind == "dense":
            return self.dense(length)
        noise = rng.random() < 0.5
        if kind == "many":
            length, count = rng.randint(length * 3 // 4, length), rng.randint(2, 5)
            count = min(count, 3) if length < 240 else count  # five numbers need about 240 tokens
            return self.encode(*self.document(length, count, min(2, count), noise))
        count = rng.randint(2, 3) if rng.random() < 0.15 else 1
        return self.encode(*self.document(length, count, 1, noise))

    def batch(self, kind: str, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and roles [size, longest sequence]; padding on the right has no role."""
        rows = [self.sequence(kind, length) for _ in range(size)]
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = [ids + [pad] * (longest - len(ids)) for ids, _ in rows]
        roles = [roles + [IGNORE] * (longest - len(roles)) for _, roles in rows]
        return torch.tensor(ids), torch.tensor(roles)


def build_model(args: argparse.Namespace, vocab_size: int) -> LlamaForCausalLM:
    """Return a freshly initialised Llama with tied embeddings."""
    sizes = {name: getattr(args, name) for name in ARCHITECTURE} | {"vocab_size": vocab_size}
    rope = {"rope_theta": args.rope_theta, "rope_type": "default"}
    other: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    # Narrow layers need more than the usual 0.02: with it nothing was copied after 400 steps.
    other["initializer_range"] = args.hidden_size**-0.5
    config = LlamaConfig(**sizes, **other, rope_parameters=rope, tie_word_embeddings=True)
    return LlamaForCausalLM(config)


def forward_loss(
    model: Any, ids: torch.Tensor, roles: torch.Tensor, text_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the loss and its parts; the logits are computed only where they are needed.

    Parameters
    ----------
    model : LlamaForCausalLM
        Model under training.
    ids, roles : torch.Tensor
        Token ids and their roles, both [batch, length].
    text_weight : float
        Weight of the mean loss on TEXT tokens; ANSWER tokens have weight 1.
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets, roles = ids[:, 1:], roles[:, 1:]
    used = roles != IGNORE
    logits = model.lm_head(hidden[used]).float()  # [num_used, vocab]
    entropy = F.cross_entropy(logits, targets[used], reduction="none")
    is_answer = roles[used] == ANSWER
    loss = answer_loss = entropy[is_answer].mean()
    if not is_answer.all():
        loss = answer_loss + text_weight * entropy[~is_answer].mean()
    correct = (logits.detach().argmax(-1) == targets[used])[is_answer]
    in_answer = roles == ANSWER
    starts = in_answer & ~F.pad(in_answer, (1, 0))[:, :-1]  # first token of every answer
    answer_index = (starts.flatten().cumsum(0) - 1)[in_answer.flatten()]
    wrong = torch.bincount(answer_index, weights=(~correct).float())
    return loss, {
        "answer_loss": answer_loss.item(),
        "tokens": correct.float().mean().item(),
        "exact": (wrong == 0).float().mean().item(),
    }


def train_phase(
    model: Any, phase: Phase, steps: int, train: TextSource, held: TextSource, args: Any
) -> list[dict[str, float]]:
    """Run one phase and return its trace of training loss and held-out accuracy."""
    device, first = next(model.parameters()).device, PHASES[0]
    # On a CPU the backward pass of SDPA takes twice as long on short sequences.
    model.set_attn_implementation("eager" if phase.length <= 512 else "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.98))
    warmup = max(1, min(20, steps // 10))

    def factor(step: int) -> float:
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        return min(1.0, (step + 1) / warmup) * cosine

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    held_ids, held_roles = held.batch(phase.kind, phase.length, max(8, phase.batch))
    trace, losses, began = [], [], time.perf_counter()
    for step in range(1, steps + 1):
        drawn = first if train.rng.random() < phase.dense_share else phase
        ids, roles = train.batch(drawn.kind, drawn.length, drawn.batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            loss, _ = forward_loss(model, ids.to(device), roles.to(device), args.text_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if step % args.log_every == 0 or step == steps:
            with torch.no_grad():
                _, scores = forward_loss(model, held_ids.to(device), held_roles.to(device), 0.0)
            row = {"step": step, "train_loss": sum(losses) / len(losses), **scores}
            row["seconds"] = time.perf_counter() - began
            trace.append({name: round(value, 4) for name, value in row.items()})
            print(f"stage {phase.stage} {phase.kind} {phase.length}:", trace[-1], flush=True)
            losses = []
    return trace


@torch.no_grad()
def exact_answers(model: Any, source: TextSource, length: int, num_prompts: int) -> dict[str, Any]:
    """Count the prompts whose whole answer greedy decoding would give.

    One forward pass per prompt is enough: greedy decoding repeats the answer exactly if and only
    if every one of its tokens, the space before the digits included, is the most likely one after
    the correct tokens before it. Half of the prompts are sentences, half are the noise line.
    """
    device, exact, sizes = next(model.parameters()).device, [], []
    for index in range(num_prompts):
        ids, roles = source.encode(*source.document(length, noise=index % 2 == 1))
        first = roles.index(ANSWER)  # the space
        end = first + 1 + NUM_DIGITS
        inputs = torch.tensor([ids[: end - 1]], device=device)
        logits = model(input_ids=inputs, logits_to_keep=1 + NUM_DIGITS, use_cache=False).logits
        exact.append(logits[0].argmax(-1).tolist() == ids[first:end])
        sizes.append(first)
    return {
        "length": length,
        "mean_prompt_tokens": round(sum(sizes) / num_prompts, 1),
        "prompts": num_prompts,
        "exact": sum(exact),
        "exact_sentences": sum(exact[0::2]),
        "exact_noise": sum(exact[1::2]),
    }


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the weights in bfloat16 and the tokenizer; the model in memory stays as it is."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder for the model, the tokenizer and training.json")
    add("--tokenizer", type=Path, help="folder of a tokenizer to use instead of training one")
    add("--resume", type=Path, help="folder of a model and tokenizer to continue from")
    add("--eval-only", action="store_true", help="only evaluate the model given by --resume")
    add("--stages", default="1,2,3,4", help="stages of the table to run (default: %(default)s)")
    add("--steps-scale", type=float, default=1.0, help="factor on every number of steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads of torch")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    add("--text-weight", type=float, default=0.05, help="loss weight of all but the answers")
    add("--log-every", type=int, default=50, help="steps between two held-out checks")
    add("--eval-lengths", default="512,1024,2048,4096", help="tokens of the evaluation prompts")
    add("--eval-prompts", type=int, default=20, help="evaluation prompts per length")
    for name, default in ARCHITECTURE.items():
        add("--" + name.replace("_", "-"), type=int, default=default)
    add("--rope-theta", type=float, default=100_000.0)
    args = parser.parse_args(argv)
    if args.eval_only and args.resume is None:
        parser.error("--eval-only needs --resume DIR")
    if not args.eval_only and args.out is None:
        parser.error("--out DIR is required for training")
    if unknown := set(args.stages.split(",")) - {str(p.stage) for p in PHASES}:
        parser.error(f"--stages {args.stages}: no stage {', '.join(sorted(unknown))}; use 1 to 4")
    return args


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and write the report."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    sentences = docstring_sentences()
    held_sentences = sentences[::10]
    sentences = [s for i, s in enumerate(sentences) if i % 10]
    if folder := args.tokenizer or args.resume:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = train_tokenizer(sentences, args.vocab_size)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        model = build_model(args, len(tokenizer))
    model.to(args.device)
    print(f"{model.num_parameters():,} parameters, {len(sentences):,} training sentences")

    began, phases = time.perf_counter(), []
    train = TextSource(tokenizer, sentences, args.seed)
    held = TextSource(tokenizer, held_sentences, args.seed + 1)
    for phase in PHASES:
        if args.eval_only or str(phase.stage) not in args.stages.split(","):
            continue
        steps = max(1, round(phase.steps * args.steps_scale))
        trace = train_phase(model, phase, steps, train, held, args)
        phases.append({**asdict(phase), "steps": steps, "trace": trace})
        save(model, tokenizer, args.out)
    answers = []
    for length in map(int, args.eval_lengths.split(",")):
        answers.append(exact_answers(model, held, length, args.eval_prompts))
        print(answers[-1], flush=True)
    if args.eval_only:
        return
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {
        "settings": settings,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - began, 1),
        "phases": phases,
        "exact_answers": answers,
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
