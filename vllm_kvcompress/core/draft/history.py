"""How a request's drafts have fared, and how many to make next.

A step that accepts all its drafts earns one more, a step that rejects some goes back to one more
than it accepted: a wrong draft costs a pass over the view and a row of the verification, so drafts
behind the point where acceptance usually ends are not worth making.
"""

from dataclasses import dataclass

_WEIGHT = 0.2  # of a step in the running rate: about its last five steps count


@dataclass
class DraftHistory:
    """One request since its last view was taken.

    Attributes
    ----------
    limit : int
        Most tokens to draft per step.
    length : int
        Tokens to draft next, if lengths adapt.
    rate : float
        Running share of drafts that were accepted; 1 before the first.
    num_steps : int
        Steps that verified drafts.
    """

    limit: int
    length: int = 0
    rate: float = 1.0
    num_steps: int = 0

    def __post_init__(self) -> None:
        self.length = self.length or self.limit

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Count one verification of so many drafts, at least one."""
        assert 0 <= num_accepted <= num_drafts and num_drafts > 0, (num_accepted, num_drafts)
        self.num_steps += 1
        self.rate += _WEIGHT * (num_accepted / num_drafts - self.rate)
        if num_accepted < num_drafts:
            self.length = num_accepted + 1
        elif num_drafts >= self.length:  # fewer may have been made: the end of the output is near
            self.length = min(self.length + 1, self.limit)
