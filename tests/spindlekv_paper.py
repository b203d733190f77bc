# ruff: noqa: E741 (l is the paper's)
"""SpindleKV as its paper has it, one number after the other in float64; no test itself.

A plain transcription of arXiv 2507.06517 (ACL 2025), which tests hold the package against. Names
are the paper's: h query heads, h_g KV heads, h_n = h / h_g, d_h their width, l tokens of the
prompt, l_w of them in the observation window, l_c = l - l_w before it, r_c the share of these to
keep, S cosines, G the graph of those above theta. Where the paper is silent or misprinted, the
comment says what is done.
"""

import math
from dataclasses import dataclass, field

import numpy as np

THETA_K, THETA_V, BETA = 0.98, 0.95, 0.05

# --- which tokens stay ------------------------------------------------------------------------


def accumulated_scores(queries: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    """ac [h, l] from the window's queries [h, l_w, d_h] and all keys [h_g, l, d_h], after RoPE."""
    h, l_w, _ = queries.shape
    h_g, l, _ = keys.shape
    ac = np.zeros((h, l))
    for i in range(h):
        for q in range(l_w):
            last = l - l_w + q
            logits = [float(queries[i, q] @ keys[i * h_g // h, a]) * scale for a in range(last + 1)]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            for a in range(last + 1):
                ac[i, a] += weights[a] / sum(weights)
        for a in range(l):
            ac[i, a] /= l - a
    return ac


def context_ratio(r: float, l: int, l_w: int) -> float:
    """r_c that keeps the share r of all l tokens, the window's among them."""
    return (r * l - l_w) / (l - l_w)


def layer_ratios(r_c: float, m: int, beta: float = BETA) -> list[float]:
    """r_c of each of m layers, first layer first.

    The last ratio for r_c > alpha is printed as 1 - 2 r_c, which is negative; 2 r_c - 1 makes the
    mean r_c. For r_c <= beta, which the paper leaves open, all layers keep r_c.
    """
    alpha = (1 + beta) / 2
    if r_c <= beta:
        first = last = r_c
    elif r_c <= alpha:
        first, last = 2 * r_c - beta, beta
    else:
        first, last = 1.0, 2 * r_c - 1
    return [first + layer * (last - first) / (m - 1) for layer in range(m)]


def top_k(scores: np.ndarray, k: int) -> list[int]:
    """Ascending places of the k largest, the earlier of equal ones."""
    return sorted(sorted(range(len(scores)), key=lambda a: (-scores[a], a))[:k])


def kept_tokens(ac: np.ndarray, k: int, l_w: int, h_g: int, repeat: bool) -> list[list[int]]:
    """Tokens that each query head keeps: its k best before the window, and the window.

    With `repeat` every query head chooses for itself, as if each had KV heads of its own; without,
    the query heads of a KV head choose by their mean score.
    """
    h, l = ac.shape
    h_n = h // h_g
    kept = []
    for i in range(h):
        group = i // h_n
        scores = ac[i] if repeat else ac[group * h_n : (group + 1) * h_n].mean(axis=0)
        kept.append([*top_k(scores[: l - l_w], k), *range(l - l_w, l)])
    return kept


# --- RoPE and attention -----------------------------------------------------------------------


def rope(vector: np.ndarray, position: int, inv_freq: np.ndarray, sign: int = 1) -> np.ndarray:
    """Turn channels (a, a + half) by the position's angles; sign -1 turns back.

    Angles are products in float32, as models compute theirs: all else here is float64.
    """
    half, turned = len(inv_freq), vector.astype(np.float64)
    for a in range(half):
        angle = sign * float(np.float32(position) * np.float32(inv_freq[a]))
        one, other = float(vector[a]), float(vector[a + half])
        turned[a] = one * math.cos(angle) - other * math.sin(angle)
        turned[a + half] = other * math.cos(angle) + one * math.sin(angle)
    return turned


def attend(query: np.ndarray, keys: list, values: list, scale: float) -> np.ndarray:
    """Output [d_h] of one query over some keys and values."""
    logits = [float(query @ key) * scale for key in keys]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return sum(w / sum(weights) * value for w, value in zip(weights, values, strict=True))


# --- the codebook -----------------------------------------------------------------------------


def length_of(vector: np.ndarray) -> float:
    return math.sqrt(sum(float(x) * float(x) for x in vector))


def unit_of(vector: np.ndarray) -> np.ndarray:
    """Its direction; a zero vector has none and stays zero."""
    length = length_of(vector)
    return vector / length if length else vector.astype(np.float64)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of unit vectors; at most 1, which rounding alone exceeds."""
    return min(float(one @ other), 1.0)


def graph(units: list[np.ndarray], theta: float) -> list[list[bool]]:
    """G = [S > theta]. A vector is always its own neighbour: its cosine is 1, however rounded."""
    n = len(units)
    return [[i == j or cosine(units[i], units[j]) > theta for j in range(n)] for i in range(n)]


def greedy_cover(G: list[list[bool]]) -> tuple[list[int], list[int]]:
    """Places of the entries in order of choice, and the number of each node's entry.

    The node with most neighbours left becomes the next entry (equation 10: row sums of G; the
    printed algorithm 1 adds up S), the earliest of several; it and they leave.
    """
    left, entries, index = set(range(len(G))), [], [-1] * len(G)
    while left:
        degree = {i: sum(G[i][j] for j in left) for i in sorted(left)}
        chosen = max(degree, key=lambda i: (degree[i], -i))
        for j in sorted(left):
            if G[chosen][j]:
                index[j] = len(entries)
                left.remove(j)
        entries.append(chosen)
    return entries, index


@dataclass
class Codebook:
    """Unit vectors that stand for the vectors of one kind (K before RoPE, or V).

    Attributes
    ----------
    theta : float
        Cosine above which two vectors may share an entry.
    entries : list
        [d_h] each: members of what was built over, never means.
    index, magnitude : list
        Entry number and length of every vector; the number is -1 while a vector waits.
    waiting : dict
        Vectors that matched no entry, by place, until the next build.
    """

    theta: float
    entries: list[np.ndarray] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    magnitude: list[float] = field(default_factory=list)
    waiting: dict[int, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, vectors: list[np.ndarray] | np.ndarray, theta: float) -> "Codebook":
        """The build after the prompt."""
        book = cls(theta)
        for vector in vectors:
            book._wait(vector)
        book.build()
        return book

    def append(self, vector: np.ndarray) -> None:
        """The decode step: an entry that is near enough, or wait for the next build.

        Of several near ones the nearest; the paper does not say which.
        """
        cosines = [cosine(unit_of(vector), entry) for entry in self.entries]
        best = int(np.argmax(cosines)) if cosines else -1
        if best < 0 or cosines[best] <= self.theta:
            self._wait(vector)
            return
        self.index.append(best)
        self.magnitude.append(length_of(vector))

    def _wait(self, vector: np.ndarray) -> None:
        self.waiting[len(self.index)] = np.asarray(vector, dtype=np.float64)
        self.index.append(-1)
        self.magnitude.append(length_of(vector))

    def build(self) -> None:
        """Cover what waits. How often this happens while decoding is not stated in the paper."""
        places = list(self.waiting)
        units = [unit_of(self.waiting[place]) for place in places]
        chosen, index = greedy_cover(graph(units, self.theta))
        for place, number in zip(places, index, strict=True):
            self.index[place] = len(self.entries) + number
        self.entries += [units[node] for node in chosen]
        self.waiting.clear()

    def reconstruct(self, place: int) -> np.ndarray:
        """Gamma_r = C[index] * magnitude; what waits is there as it is."""
        if place in self.waiting:
            return self.waiting[place]
        return self.entries[self.index[place]] * self.magnitude[place]


# --- one KV head with the query heads that share it -------------------------------------------


@dataclass
class Group:
    """What is stored of one KV head.

    Attributes
    ----------
    kept : list
        Positions that each of its h_n query heads attends to.
    place : dict
        Place of (query head, position) in both books; without repetition all query heads' are one.
    books : dict
        "K" and "V".
    inv_freq : np.ndarray
        Of RoPE, radians per position.
    repeat : bool
        Whether every query head has copies of its own.
    """

    kept: list[list[int]]
    place: dict[tuple[int, int], int]
    books: dict[str, Codebook]
    inv_freq: np.ndarray
    repeat: bool

    def attend(self, head: int, query: np.ndarray, scale: float) -> np.ndarray:
        """One query head's output [d_h] over what is given back, keys turned to their positions."""
        keys, values = [], []
        for position in self.kept[head]:
            place = self.place[head, position]
            keys.append(rope(self.books["K"].reconstruct(place), position, self.inv_freq))
            values.append(self.books["V"].reconstruct(place))
        return attend(query, keys, values, scale)

    def append(self, key: np.ndarray, value: np.ndarray, position: int) -> None:
        """A generated token, key after RoPE; every query head attends to it."""
        for head, kept in enumerate(self.kept):
            if self.repeat or head == 0:
                place = len(self.books["K"].index)
                self.books["K"].append(rope(key, position, self.inv_freq, sign=-1))
                self.books["V"].append(value)
            self.place[head, position] = place
            kept.append(position)


def compress(
    keys: np.ndarray,
    values: np.ndarray,
    kept: list[list[int]],
    inv_freq: np.ndarray,
    repeat: bool,
    theta_k: float = THETA_K,
    theta_v: float = THETA_V,
) -> Group:
    """Books of one KV head [l, d_h] for what each of its query heads keeps; keys after RoPE.

    With `repeat` every query head's copies are vectors of their own, in one book that all of them
    share: copies have a cosine of 1 and so one entry. (The paper writes S per head; without a
    shared book its repetition would cost h_n times the memory.)
    """
    place: dict[tuple[int, int], int] = {}
    vectors: dict[str, list[np.ndarray]] = {"K": [], "V": []}
    for head, positions in enumerate(kept):
        for position in positions:
            if head and not repeat:
                place[head, position] = place[0, position]
                continue
            place[head, position] = len(vectors["K"])
            vectors["K"].append(rope(keys[position], position, inv_freq, sign=-1))
            vectors["V"].append(values[position].astype(np.float64))
    thetas = {"K": theta_k, "V": theta_v}
    books = {kind: Codebook.of(vectors[kind], thetas[kind]) for kind in ("K", "V")}
    return Group(kept, place, books, inv_freq, repeat)


def honest_bytes(
    group: Group, d_h: int, b: int = 2, b_idx: int = 4, b_mag: int = 2, b_pos: int = 4
) -> int:
    """Bytes of a group: entries once, index and length once per stored vector, and positions.

    The paper's r_3 charges index and length once per entry, and names no positions.
    """
    total = 0
    for book in group.books.values():
        total += len(book.entries) * d_h * b + len(book.index) * (b_idx + b_mag)
        total += len(book.waiting) * d_h * b
    return total + len(group.books["K"].index) * b_pos
