"""How an average budget is spread over the layer groups: one function per shape.

Every function takes the average C, the observation window w, the number n of tokens there are to
keep from, and the number G of layer groups, and returns G targets in tokens, first group first.
But for `uniform`, w < C <= n and G > 1: `group_budgets` sees to that.
They are pure, so that scheduler and worker agree; the caller rounds and clips to [1, n]. The mean
over groups is C wherever no group hits a limit. The window is kept by every group; what is spread
is the rest, C - w of n - w tokens.
"""

from collections.abc import Callable

from vllm_kvcompress.config.settings import LayerBudgetConfig
from vllm_kvcompress.errors import ConfigError

Shape = Callable[[int, int, int, int, LayerBudgetConfig], list[float]]


def _line(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * index / (count - 1) for index in range(count)]


def uniform(
    average: int, window: int, num_tokens: int, count: int, config: LayerBudgetConfig
) -> list[float]:
    """Every group the average."""
    return [float(average)] * count


def pyramid(
    average: int, window: int, num_tokens: int, count: int, config: LayerBudgetConfig
) -> list[float]:
    """PyramidKV (arXiv 2406.02069, as in KVCache-Factory), over groups instead of layers.

    The last group gets (C - w) / beta + w, the first 2 (C - w) - (C - w) / beta + w, linear in
    between; a first group larger than n is clipped and the last one raised, so that the average
    stays C.
    """
    spread = average - window
    lowest = spread / (config.beta or 20.0)
    highest = 2 * spread - lowest
    if highest > num_tokens - window:
        highest = num_tokens - window
        lowest = 2 * spread - highest
    return _line(window + highest, window + lowest, count)


def windowkv(
    average: int, window: int, num_tokens: int, count: int, config: LayerBudgetConfig
) -> list[float]:
    """WindowKV (arXiv 2503.17922) in the form of the released code or of the printed equations.

    Released: the last group gets floor(B gamma / beta) with B = C - w, the first 2 B less that,
    the ones between fall by a whole number of tokens. Printed (equations 5 to 7, per layer): the
    last B / lambda, the first 2 B - B / lambda, whatever gamma. The paper's budgets count no
    observation window; here the window is part of C. As in `pyramid`, a group larger than n is
    clipped, and the one at the other end raised by as much.
    """
    beta, past = config.beta or 14.0, num_tokens - window
    spread = average - window
    released = config.form == "released"
    lowest = float(int(spread * config.gamma / beta)) if released else spread / beta
    highest = 2 * spread - lowest
    if max(highest, lowest) > past:  # with gamma above beta the last group is the largest
        highest, lowest = (
            (past, 2 * spread - past) if highest > lowest else (2 * spread - past, past)
        )
    if not released:
        return _line(window + highest, window + lowest, count)
    step = int(abs(highest - lowest)) // (count - 1) * (1 if highest >= lowest else -1)
    between = [window + highest - step * index for index in range(count - 1)]
    return [*between, window + lowest]


def linear(
    average: int, window: int, num_tokens: int, count: int, config: LayerBudgetConfig
) -> list[float]:
    """SpindleKV's kept ratios (arXiv 2507.06517), linear from the first group to the last.

    With r the share of the n - w tokens to keep and b = beta: for b < r <= (1 + b) / 2 the first
    group keeps 2 r - b and the last b; above, 1 and 2 r - 1 (the paper prints 1 - 2 r, which is
    negative and does not average to r); at or below b, which the paper leaves open, all keep r.
    """
    beta = 0.05 if config.beta is None else config.beta
    past = num_tokens - window
    ratio = (average - window) / past
    if ratio <= beta:
        return uniform(average, window, num_tokens, count, config)
    first, last = (2 * ratio - beta, beta) if ratio <= (1 + beta) / 2 else (1.0, 2 * ratio - 1)
    return [window + past * share for share in _line(first, last, count)]


def preference(
    average: int, window: int, num_tokens: int, count: int, config: LayerBudgetConfig
) -> list[float]:
    """CAKE's split (arXiv 2503.12491): group g gets P_g / sum(P) of the total.

    The paper measures the preferences P on every prompt while it is prefilled. Here they come
    with the configuration, so that lengths are known before anything is computed. A group larger
    than n is clipped; what it cannot use goes to the others in proportion.
    """
    weights = config.preferences or ()
    if len(weights) != count:
        raise ConfigError(
            f"layer_budget.preferences: there are {len(weights)} numbers and {count} layer groups; "
            "give one per layer group."
        )
    past = num_tokens - window
    targets = [0.0] * count
    left, open_groups = float(count * (average - window)), set(range(count))
    while open_groups and left > 0:
        total = sum(weights[group] for group in open_groups)
        full = {g for g in open_groups if weights[g] / total * left >= past}
        for group in full or open_groups:
            targets[group] = past if full else weights[group] / total * left
        left -= past * len(full)
        open_groups = open_groups - full if full else set()
    return [window + target for target in targets]


SHAPES: dict[str, Shape] = {
    "uniform": uniform,
    "pyramid": pyramid,
    "windowkv": windowkv,
    "linear": linear,
    "preference": preference,
}
