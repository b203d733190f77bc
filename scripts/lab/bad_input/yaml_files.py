"""Files that are no good setting, or nearly one: written from a seed, one kind after the other."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from vllm_kvcompress.config.reading import preset_names
from vllm_kvcompress.config.yaml_reader import MAX_BYTES

GOOD = "policy: {name: snapkv}\nbudget: {ratio: 0.25}\n"
MARK = "kvcprobe"

Make = Callable[[random.Random, Path], bytes | None]
"""Returns what the file holds, or makes something else than a regular file and returns None."""


def _preset(rng: random.Random) -> bytes:
    name = rng.choice(preset_names())
    text = (files("vllm_kvcompress.configs") / f"{name}.yaml").read_text(encoding="utf-8")
    return "\n".join(line for line in text.split("\n") if not line.startswith("#")).encode()


# --- text ---------------------------------------------------------------------------------


def bytes_changed(rng: random.Random, path: Path) -> bytes:
    """A preset with some bytes turned, lost or doubled."""
    data = bytearray(_preset(rng))
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        how = rng.randrange(3)
        if how == 0:
            data[place] = rng.randrange(256)
        elif how == 1:
            del data[place]
        else:
            data[place:place] = data[place : place + rng.randint(1, 40)]
    return bytes(data)


def lines_moved(rng: random.Random, path: Path) -> bytes:
    """A preset with lines swapped, doubled or pushed in."""
    lines = _preset(rng).split(b"\n")
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(lines))
        lines.insert(rng.randrange(len(lines)), b" " * rng.randrange(5) + lines[place].strip())
    return b"\n".join(lines)


def deep(rng: random.Random, path: Path) -> bytes:
    """Nested from 10 to 100,000 deep, in brackets, braces, lists or by indentation."""
    depth = rng.choice([10, 16, 17, 100, 1000, 10_000, 100_000])
    indented = min(depth, 600)
    return rng.choice(
        [
            "budget: " + "[" * depth + "]" * rng.choice([0, depth]),
            "budget: " + "{a: " * depth + "}" * rng.choice([0, depth]),
            "policy:\n" + "".join(f"{' ' * (i + 1)}a:\n" for i in range(indented)),
            "pinned:\n" + "- " * depth + "1",
            "? " * depth + "1",
            "a: " + "&x [" * depth,
            GOOD + "# " + "[" * depth,
        ]
    ).encode()


def aliases(rng: random.Random, path: Path) -> bytes:
    """Anchors: laughing, in themselves, missing, in names, through merge keys."""
    levels, width = rng.randint(2, 12), rng.randint(2, 12)
    laughs = ["a0: &a0 [x, y]"]
    laughs += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    merges = ["m0: &m0 {k: 1}"]
    merges += [
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * width)}]}}" for i in range(1, levels)
    ]
    return rng.choice(
        [
            "\n".join(laughs),
            "\n".join(merges),
            "a: &a [*a]",
            "a: &a {b: *a}",
            "&a a: *a",
            "? &a [1]\n: *a",
            "a: *missing",
            "b: &b {ratio: 0.5}\npolicy: {name: snapkv}\nbudget: *b",
            "budget: {<<: &b {ratio: 0.5}}\npolicy: {name: snapkv}",
            "policy: {name: snapkv}\nbudget: &b {<<: *b}",
            "<<: 1",
            "<<: [1, {budget: 2}]",
            "a: &" + "x" * 50_000 + " 1",
        ]
    ).encode()


def doubled(rng: random.Random, path: Path) -> bytes:
    """A field twice, at the top or below."""
    again = rng.choice(["budget: {ratio: 0.1}", "policy: {name: h2o}", "budget: ", "'budget': 1"])
    inside = "policy: {name: snapkv, name: h2o}\nbudget: {ratio: 0.1, ratio: 0.1}"
    return rng.choice([GOOD + again, GOOD + GOOD, inside, GOOD + "---\n" + GOOD]).encode()


def numbers(rng: random.Random, path: Path) -> bytes:
    """Numbers that are too large, no number, or written oddly."""
    value = rng.choice(
        [
            *("1" * rng.choice([20, 400, 5000, 100_000]), "-" + "9" * 400, "0x" + "f" * 100_000),
            *("0b" + "1" * 5000, "0o17", "017", "1e400", "-1e400", "1e-400", "1.5e+999", ".inf"),
            *("-.inf", ".nan", ".NaN", "1_000", "_1", "1:30", "1:59" * 9, "190:20:30.15", "+1"),
            *("1:" + "59:" * 3000 + "59", "1:" + "59:" * 3000 + "59.5", "0x", "0b2", "1e", "--1"),
            *("true", "yes", "~", "''", "2024-13-99", "2024-01-01", "1,5", "٣", "1.0000000000001"),
        ]
    )
    field = rng.choice(
        ["ratio", "tokens", "floor", "observation_window", "num_sink_tokens", "interval"]
    )
    if field in ("ratio", "tokens", "floor"):
        return f"policy: {{name: snapkv}}\nbudget: {{{field}: {value}}}\n".encode()
    return f"{GOOD}{field}: {value}\n".encode()


def encodings(rng: random.Random, path: Path) -> bytes:
    """Other encodings, byte order marks, bytes that are no text."""
    text = GOOD + "# Größe — 𐌠\n"
    return rng.choice(
        [
            *(text.encode("utf-16"), text.encode("utf-16-be"), text.encode("utf-32")),
            *(text.encode("latin-1", "replace"), text.encode("cp1252", "replace")),
            *(text.encode("utf-8-sig"), b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD.encode()),
            *(b"\xff\xfe", b"\xff", GOOD.encode() + b"\xc0\xaf", GOOD.encode() + b"\xed\xa0\x80"),
            *(b"\x80" * rng.randint(1, 99), rng.randbytes(rng.randint(1, 400)), b""),
            "budget: {ratio: 0.2}\npolicy: {name: snapkv\ufeff}".encode(),
        ]
    )


def signs(rng: random.Random, path: Path) -> bytes:
    """NUL bytes, tabs, carriage returns, escapes of terminals, marks of writing direction."""
    sign = rng.choice(
        ["\0", "\t", "\r", "\r\n", "\x1b[2J", "\x07", "\x85", "\u2028", "\u202e", "\x7f", "\ufffe"]
    )
    places = [GOOD.replace(" ", sign), GOOD.replace("\n", sign), sign + GOOD, GOOD + sign]
    places += [GOOD.replace("snapkv", f"snap{sign}kv"), f'{GOOD}"x{sign}": 1', f"{GOOD}#{sign}"]
    places += [f"{GOOD}{sign * 1000}: 1", GOOD + '"\\U00110000": 1', GOOD + '"\\ud800": 1']
    return rng.choice(places).encode("utf-8", "surrogatepass")


def tags(rng: random.Random, path: Path) -> bytes:
    """What a loader of Python objects would run."""
    tag = rng.choice(
        [
            *("!!python/object/apply:os.system ['touch kvcprobe']", "!!python/name:os.system"),
            *("!!python/module:kvcprobe", "!!python/object/new:type [x, [], {}]", "!x y"),
            *("!!python/object:kvcprobe.X {}", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]"),
            *("!!timestamp 2024-01-01", "!!int '1'", "!!str 1", "!<tag:x> 1", "!include kvcprobe"),
            *("!!python/tuple [1, 2]", "!!float .nan", "! snapkv", "!!null ''", "!!merge x"),
        ]
    )
    places = [tag, f"policy: {tag}", f"policy: {{name: {tag}}}", f"{GOOD}pinned: [{tag}]"]
    places += [f"{GOOD}{tag}: 1", f"%TAG ! tag:x,2000:\n---\n{GOOD}a: !y z"]
    return rng.choice(places).encode()


def large(rng: random.Random, path: Path) -> bytes:
    """At the limit of a file's size, and beyond."""
    size = rng.choice([MAX_BYTES - 1, MAX_BYTES, MAX_BYTES + 1, 4 * MAX_BYTES])
    # Nodes are what takes seconds: few files of them.
    slow = ["[0, 1],", "a: 1\n", "- "]
    piece = rng.choice(slow if rng.random() < 0.06 else ["#" * 1023 + "\n", "x", " ", "\n", "'"])
    start = rng.choice(["", GOOD, GOOD + "pinned: [", GOOD + "x: "])
    return (start + piece * (size // len(piece)))[:size].encode()


def other_values(rng: random.Random, path: Path) -> bytes:
    """A path, code or a list where a name belongs, and names of fields that are none."""
    value = rng.choice(
        [f"../{MARK}", f"/etc/{MARK}", f"{MARK}.module:Class", "[]", "{}", "[snapkv]", "null"]
    )
    field = rng.choice(["policy", "budget", "pinned", "tasks", "trigger", "mode", "version", "x"])
    return rng.choice(
        [f"{GOOD}{field}: {value}", f"policy: {{name: {value}}}\nbudget: {{ratio: 0.5}}", value]
    ).encode()


# --- what is no regular file --------------------------------------------------------------


def folder(rng: random.Random, path: Path) -> None:
    """A directory of that name."""
    path.mkdir()


def pipe(rng: random.Random, path: Path) -> None:
    """Whoever reads it waits for ever."""
    os.mkfifo(path)


def endpoint(rng: random.Random, path: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as made, suppress(OSError):
        made.bind(str(path))  # of a path of 108 bytes at most: else there is no file


def link(rng: random.Random, path: Path) -> None:
    """To nothing, to itself, to devices, to a file whose pages cannot be read."""
    target = rng.choice(
        [
            str(path.parent / MARK),
            str(path),
            "/dev/zero",
            "/dev/null",
            "/dev/full",
            "/proc/self/mem",
            "/",
        ]
    )
    path.symlink_to(target)


def unreadable(rng: random.Random, path: Path) -> None:
    """Nobody may read it (root may)."""
    path.write_text(rng.choice([GOOD, "budget: x"]), encoding="utf-8")
    path.chmod(0)


KINDS: tuple[Make, ...] = (
    *(bytes_changed, bytes_changed, lines_moved, deep, aliases, doubled, numbers, numbers),
    *(encodings, signs, signs, tags, other_values, large, folder, pipe, endpoint, link, unreadable),
)


def write_files(top: Path, count: int, seed: int = 0) -> Iterator[tuple[str, Path]]:
    """Write `count` files, and yield the kind and the path of each as soon as it is there."""
    for number in range(count):
        make = KINDS[number % len(KINDS)]
        rng = random.Random(f"{seed}/{number}")
        path = top / f"{number}.yaml"
        data = make(rng, path)
        if data is not None:
            path.write_bytes(data)
        yield make.__name__, path
