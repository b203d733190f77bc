"""The probe model's training script: data, tokenizer, loss and one tiny training run."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from lab.probe_model import command, learning, texts


@pytest.fixture(scope="module")
def sentences():
    return texts.docstring_sentences(max_files=60)


@pytest.fixture(scope="module")
def tokenizer(sentences):
    return texts.train_tokenizer(sentences, vocab_size=1024)


@pytest.fixture
def source(tokenizer, sentences):
    return texts.TextSource(tokenizer, sentences, seed=0)


def answer_runs(ids, roles):
    """Return the runs of consecutive ANSWER tokens."""
    runs, previous = [], None
    for position, (token, role) in enumerate(zip(ids, roles, strict=True)):
        if role == texts.ANSWER:
            if previous != position - 1:
                runs.append([])
            runs[-1].append(token)
            previous = position
    return runs


def split_pairs(ids, dot):
    """Return the pairs of a dense sequence, each a tuple of ids without its dot."""
    pairs, start = [], 0
    for position, token in enumerate(ids):
        if token == dot:
            pairs.append(tuple(ids[start:position]))
            start = position + 1
    assert start == len(ids)
    return pairs


def test_sentences_hold_no_long_numbers(sentences):
    assert len(sentences) > 200
    assert len(set(sentences)) == len(sentences)
    assert not any(re.search(r"\d{3}|\n", s) for s in sentences)


def test_tokenizer_gives_every_digit_its_own_token(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"]) == [0, 1, 2]
    assert len(tokenizer) == 1024
    digit_ids = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    ids = tokenizer("key-7 is: 4182907.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert "".join(tokenizer.decode([i]) for i in ids if i in digit_ids) == "74182907"
    with_digit = [t for t in tokenizer.get_vocab() if any(c in "0123456789" for c in t)]
    assert sorted(with_digit) == list("0123456789")


def test_tokenizer_reads_back_what_it_wrote(tokenizer, source):
    text, _ = source.document(256)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    message = [{"role": "user", "content": "one "}, {"role": "user", "content": "two"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "one two"


@pytest.mark.parametrize("length", [63, 96, 111])
def test_dense_roles_cover_exactly_the_repeated_values(source, tokenizer, length):
    for _ in range(20):
        ids, roles = source.dense(length)
        assert length - 26 < len(ids) == len(roles) <= length  # a pair takes at most 24 tokens
        middle = 1 + (len(ids) - 1) // 2
        assert texts.ANSWER not in roles[:middle]
        digits = set(source.digits)
        assert [r == texts.ANSWER for r in roles[middle:]] == [i in digits for i in ids[middle:]]

        first, second = (
            split_pairs(ids[1:middle], source.dot),
            split_pairs(ids[middle:], source.dot),
        )
        assert sorted(first) == sorted(second)
        assert all(3 <= len(run) <= 7 for run in answer_runs(ids, roles))


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(
    ("length", "numbers", "questions"), [(130, 1, 1), (256, 5, 2), (777, 3, 1)]
)
def test_document_roles_cover_exactly_the_answers(
    source, tokenizer, length, numbers, questions, noise
):
    text, spans = source.document(length, numbers, questions, noise)
    ids, roles = source.encode(text, spans)
    assert length - 90 < len(ids) <= length
    assert text.startswith(texts.HEADER + "\n")
    assert len(spans) == questions
    assert roles[0] == texts.IGNORE and texts.IGNORE not in roles[1:]
    for run, (start, end) in zip(answer_runs(ids, roles), spans, strict=True):
        assert tokenizer.decode(run) == text[start:end] and len(run) == 1 + texts.NUM_DIGITS
        number = text[start:end].removeprefix(" ")
        assert len(number) == texts.NUM_DIGITS and number.isdigit()
        # The needle with the key that is asked for holds this number.
        question = text[:start].splitlines()[-1]
        key = question.split(" mentioned")[0].split(" for ")[1]
        assert question == texts.QUESTION.format(key=key)
        assert texts.NEEDLE.format(key=key, number=number) in text.splitlines()[1]


def test_batch_pads_without_loss(source, tokenizer):
    ids, roles = source.batch("many", 256, 6)
    assert ids.shape == roles.shape and ids.shape[1] <= 256
    padding = ids == tokenizer.pad_token_id
    assert padding.any() and (roles[padding] == texts.IGNORE).all()


def test_same_seed_same_batch(tokenizer, sentences):
    first, second = (
        texts.TextSource(tokenizer, sentences, seed=5).batch("single", 512, 2) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


class NextTokenOracle:
    """Stands in for the model: predicts ``ids[:, shift + t]`` after token t with certainty."""

    def __init__(self, vocab_size, shift):
        self.vocab_size, self.shift = vocab_size, shift

    def model(self, input_ids, use_cache):
        ahead = torch.roll(input_ids, -self.shift, dims=1)
        return SimpleNamespace(last_hidden_state=F.one_hot(ahead, self.vocab_size).float())

    def lm_head(self, hidden):
        return 50 * hidden


@pytest.mark.parametrize("kind", ["dense", "many"])
def test_loss_compares_each_token_with_the_next(source, tokenizer, kind):
    ids, roles = source.batch(kind, 256, 4)
    loss, scores = learning.forward_loss(NextTokenOracle(len(tokenizer), 1), ids, roles, 0.05)
    assert loss < 1e-6
    assert scores["tokens"] == scores["exact"] == 1.0
    loss, scores = learning.forward_loss(NextTokenOracle(len(tokenizer), 0), ids, roles, 0.05)
    assert loss > 10 and scores["exact"] == 0.0


def test_exact_counts_whole_answers(source, tokenizer):
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    roles = torch.tensor([[0, 2, 2, 0, 2, 2, 0]])  # two answers, one digit of the second is wrong

    class OneMistake(NextTokenOracle):
        def model(self, input_ids, use_cache):
            changed = input_ids.clone()
            changed[0, 5] = 4
            return super().model(changed, use_cache)

    _, scores = learning.forward_loss(OneMistake(len(tokenizer), 1), ids, roles, 0.05)
    assert scores["tokens"] == 0.75 and scores["exact"] == 0.5


def tiny_args(out, *more):
    return command.parse_args(
        ["--out", str(out), "--hidden-size", "32", "--intermediate-size", "64"]
        + ["--num-hidden-layers", "2", "--num-attention-heads", "4"]
        + ["--num-key-value-heads", "2", "--head-dim", "8", "--no-bf16", *more]
    )


def test_tiny_run_learns_and_survives_saving(tmp_path, tokenizer, source, sentences):
    torch.manual_seed(0)
    args = tiny_args(tmp_path, "--log-every", "10")
    model = learning.build_model(args, len(tokenizer))
    held = texts.TextSource(tokenizer, sentences, seed=1)
    phase = dataclasses.replace(learning.PHASES[0], lr=1e-2)
    trace = learning.train_phase(model, phase, 40, source, held, args)
    assert [row["step"] for row in trace] == [10, 20, 30, 40]
    # From a guess among 1,024 tokens (6.9) towards a guess among ten digits (2.3).
    assert trace[0]["train_loss"] > 4 and trace[-1]["answer_loss"] < 2.6

    learning.save(model, tokenizer, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.rope_parameters["rope_theta"] == 100_000.0
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.bfloat16().float(), msg=name)
    reread = AutoTokenizer.from_pretrained(tmp_path)
    assert reread.chat_template == texts.CHAT_TEMPLATE
    text, spans = source.document(200)
    assert source.encode(text, spans)[0] == reread(text).input_ids


def test_exact_answers_agree_with_greedy_decoding(tokenizer, source):
    """An answer counts when generate() writes it; force one by making the model a constant."""
    args = tiny_args("unused")
    model = learning.build_model(args, len(tokenizer)).eval()
    row = learning.exact_answers(model, source, length=160, num_prompts=4)
    assert row["exact"] == 0 and row["mean_prompt_tokens"] <= 160
    text, spans = source.document(160)
    ids, roles = source.encode(text, spans)
    first = roles.index(texts.ANSWER)
    written = model.generate(
        torch.tensor([ids[:first]]), max_new_tokens=8, do_sample=False, eos_token_id=[]
    )[0, first:]
    inputs = torch.tensor([ids[:first] + written.tolist()])
    logits = model(input_ids=inputs[:, :-1], logits_to_keep=8).logits
    assert torch.equal(logits[0].argmax(-1), written)


def test_options_are_checked(capsys):
    for argv in (["--eval-only"], ["--stages", "1"], ["--out", "x", "--stages", "1,9"]):
        with pytest.raises(SystemExit):
            command.parse_args(argv)
    assert "no stage 9" in capsys.readouterr().err
    assert json.dumps([dataclasses.asdict(p) for p in learning.PHASES])
