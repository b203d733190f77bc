"""What must hold of a server's answers, memory and books. Pure: no server, no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lab.soak.client import Answer
from lab.soak.processes import Reading
from lab.soak.questions import Question, Request

RSS_SHARE, RSS_MIB = 0.02, 24.0
"""From a quarter of the requests to their end a process may grow by this share and so many MiB."""
MORE_FILES, MORE_THREADS = 16, 4
"""And by so many open files and threads."""
MORE_ENTRIES = 64
"""A container of scheduler or worker may, from before the load to its end, by so many entries."""


@dataclass(frozen=True)
class Reference:
    """What a question's answer must be.

    Attributes
    ----------
    tokens : list[list[int]]
        By choice.
    second_turns : list[list[int]]
        Of a conversation: the second turn's answer where it goes on from the first one's cache, and
        where it is computed anew.
    """

    tokens: list[list[int]]
    second_turns: list[list[int]] = field(default_factory=list)


def any_tokens(reference: Reference, answer: Answer) -> Reference:
    """What an answer must be of which only the length is certain: its own tokens, and no fewer."""
    given = [*answer.tokens, *([] for _ in reference.tokens[len(answer.tokens) :])]
    return Reference(
        [[*own, *tokens[len(own) :]] for own, tokens in zip(given, reference.tokens, strict=False)]
    )


def stop_token(request: Request, reference: Reference) -> list[int]:
    """Stop tokens of a request: one that the expected answer has."""
    if request.stop_at is None:
        return []
    tokens = reference.tokens[0]
    return [tokens[min(request.stop_at, len(tokens) - 1)]]


def expected(
    reference: Reference, max_tokens: int, stop: Sequence[int]
) -> list[tuple[list[int], str]]:
    """Tokens and finish_reason of each choice."""
    found = []
    for tokens in reference.tokens:
        cut, reason = tokens[:max_tokens], "length"
        for place, token in enumerate(cut):
            if token in stop:
                cut, reason = cut[: place + 1], "stop"
                break
        found.append((cut, reason))
    return found


def wrong_answer(request: Request, reference: Reference, answer: Answer) -> str:
    """What is wrong with an answer; empty where nothing is."""
    if request.fate == "refused":
        if answer.outcome != "refused":
            return f"should have been refused, but: {answer.outcome} {answer.error}".rstrip()
        return ""
    if answer.outcome not in ("finished", "left"):
        return f"{answer.outcome}: {answer.error}"
    wanted = expected(reference, request.max_tokens, stop_token(request, reference))
    if len(answer.tokens) > len(wanted):
        return f"{len(answer.tokens)} choices, expected {len(wanted)}"
    for choice, found in enumerate(answer.tokens):
        tokens, reason = wanted[choice]
        whole = answer.outcome == "finished"
        if found != (tokens if whole else tokens[: len(found)]):
            return f"choice {choice}: " + _difference(found, tokens)
        if whole and answer.reasons[choice] != reason:
            return f"choice {choice}: ended by {answer.reasons[choice]}, expected {reason}"
    if answer.outcome == "finished":
        if len(answer.tokens) != len(wanted):
            return f"{len(answer.tokens)} choices, expected {len(wanted)}"
        count = sum(map(len, answer.tokens))
        if answer.num_counted != count:
            return f"{count} tokens, but usage says {answer.num_counted}"
    return ""


def wrong_second_turn(reference: Reference, answer: Answer) -> str:
    """The same for the second turn of a conversation."""
    if answer.outcome != "finished":
        return f"second turn: {answer.outcome}: {answer.error}"
    if answer.tokens[0] in reference.second_turns:
        return ""
    differences = [_difference(answer.tokens[0], each) for each in reference.second_turns]
    return "second turn: gone on, " + "; anew, ".join(differences)


def _difference(found: Sequence[int], tokens: Sequence[int]) -> str:
    same = next(
        (n for n, (a, b) in enumerate(zip(found, tokens, strict=False)) if a != b),
        min(len(found), len(tokens)),
    )
    return (
        f"differs from token {same} on: {list(found[same : same + 4])}, expected "
        f"{list(tokens[same : same + 4])} ({len(found)} tokens of {len(tokens)})"
    )


def num_compared(request: Request, answer: Answer) -> int:
    """Tokens of an answer that were held against a reference."""
    return 0 if request.fate == "refused" else sum(map(len, answer.tokens))


def growth(quarter: Sequence[Reading], end: Sequence[Reading]) -> list[str]:
    """Which processes grew more than they may, or are not the same."""
    before, after = {each.pid: each for each in quarter}, {each.pid: each for each in end}
    wrong = [f"{before[pid].name} ({pid}) is gone" for pid in before.keys() - after.keys()]
    wrong += [f"{after[pid].name} ({pid}) is new" for pid in after.keys() - before.keys()]
    for pid in before.keys() & after.keys():
        old, new = before[pid], after[pid]
        allowed = RSS_MIB + RSS_SHARE * old.rss_mib
        if new.rss_mib - old.rss_mib > allowed:
            wrong.append(
                f"{new.name} grew from {old.rss_mib:.0f} to {new.rss_mib:.0f} MiB; "
                f"{allowed:.0f} MiB are allowed"
            )
        if new.num_files - old.num_files > MORE_FILES:
            wrong.append(f"{new.name} has {new.num_files} open files; it had {old.num_files}")
        if new.num_threads - old.num_threads > MORE_THREADS:
            wrong.append(f"{new.name} has {new.num_threads} threads; it had {old.num_threads}")
    return wrong


def grown_containers(before: Mapping[str, int], after: Mapping[str, int]) -> list[str]:
    """Which containers have more entries than they may."""
    return [
        f"{path} has {size} entries; it had {before.get(path, 0)}"
        for path, size in after.items()
        if size - before.get(path, 0) > MORE_ENTRIES
    ]


def differ(questions: Sequence[Question], references: Mapping[str, Reference]) -> int:
    """Answers that are no other question's: the more, the more an equal answer says."""
    answers = [str(references[each.name].tokens) for each in questions if each.name in references]
    return sum(answers.count(each) == 1 for each in answers)
