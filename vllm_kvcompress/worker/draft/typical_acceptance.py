"""Typical acceptance: drafts stand where the target finds them likely enough. Lossy.

Rejection sampling turns a likely draft down now and then, as the target's distribution demands.
Here a draft x stands if p(x) > min(epsilon, delta exp(-H)), p being the target's distribution at
its place and H p's entropy in nats: where the target is sure, a draft must be one of its few
candidates; where many tokens would do, any of these. The longest run of drafts that stand is
accepted, and one token drawn from p at the next place is added. More drafts are accepted; what is
sampled follows the target's distribution no longer. (Medusa, arXiv 2401.10774, section 2.3.1.)

Dimensions: R requests, k most drafts of a request, N logits rows, one for each draft and one more
for each request, V vocabulary.
"""

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

_MAX_ENTRIES = 1 << 25
"""Logits looked at together: 128 MiB per float32 temporary, which no profiling run has seen."""


class TypicalAcceptanceSampler(RejectionSampler):
    """vLLM's sampler for steps with drafts, with another test of the drafts.

    Processed logits, logprobs, grammars, penalties and seeds are vLLM's business as before. Rows
    with the temperature 0 accept a draft only if it is the target's best token. Rows without
    drafts sample what vLLM's plain sampler would.

    Parameters
    ----------
    sampler : Sampler
        The runner's sampler.
    spec_config : SpeculativeConfig
        Its number of drafts is k.
    device : torch.device
        Where it runs.
    epsilon, delta : float
        Of the rule above.
    """

    def __init__(
        self,
        sampler: Sampler,
        spec_config: SpeculativeConfig,
        device: torch.device,
        epsilon: float,
        delta: float,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self.epsilon, self.delta = epsilon, delta

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        # A row's draft is the next row's input. A request's last row has none: it gets the next
        # request's, which `longest_prefix` never looks at.
        drafts = verify_draft_sampled.roll(-1).long()
        own = self._own_tokens(processed, expanded_idx_mapping, pos)
        stands = own == drafts
        states = self.sampler.sampling_states
        if states.temperature.np[idx_mapping_np].any():
            typical = is_typical(processed, drafts, self.epsilon, self.delta)
            is_greedy = states.temperature.gpu[expanded_idx_mapping] == 0
            stands = torch.where(is_greedy, stands, typical)
        found = longest_prefix(stands, drafts, own, cu_num_logits, self.num_speculative_steps)
        return processed, *found

    def _own_tokens(
        self, processed: torch.Tensor, expanded_idx_mapping: torch.Tensor, pos: torch.Tensor
    ) -> torch.Tensor:
        """[N] int64: the token that would come next at each place if the drafts ended there."""
        states = self.sampler.sampling_states
        return gumbel_sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )


def is_typical(
    logits: torch.Tensor, drafts: torch.Tensor, epsilon: float, delta: float
) -> torch.Tensor:
    """Whether p(draft) > min(epsilon, delta exp(-entropy of p)), row by row.

    Parameters
    ----------
    logits : torch.Tensor
        [N, V], temperature applied; -inf for tokens that are ruled out.
    drafts : torch.Tensor
        [N] int64; none outside [0, V) is typical.
    epsilon, delta : float
        Of the rule.

    Returns
    -------
    torch.Tensor
        [N] bool.
    """
    num_rows = max(1, _MAX_ENTRIES // logits.shape[1])
    found = []
    for some, tokens in zip(logits.split(num_rows), drafts.split(num_rows), strict=True):
        p = some.float().softmax(dim=-1)
        threshold = delta * torch.exp(-torch.special.entr(p).sum(dim=-1))
        index = tokens.clamp(0, p.shape[1] - 1)
        of_draft = p.gather(1, index[:, None])[:, 0]
        found.append((of_draft > threshold.clamp(max=epsilon)) & (tokens == index))
    return torch.cat(found)


def longest_prefix(
    stands: torch.Tensor,
    drafts: torch.Tensor,
    own: torch.Tensor,
    cu_num_logits: torch.Tensor,
    num_steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts up to the first that does not stand, then the target's own token of that place.

    Parameters
    ----------
    stands, drafts, own : torch.Tensor
        [N]: whether the row's draft stands, the draft (int64), the target's own token (int64).
    cu_num_logits : torch.Tensor
        [R + 1], first rows of the requests, and N.
    num_steps : int
        k.

    Returns
    -------
    sampled : torch.Tensor
        [R, k + 1] int64; what lies behind `num_sampled` tokens means nothing.
    num_sampled : torch.Tensor
        [R] int32, 1 to k + 1.
    """
    starts = cu_num_logits[:-1].long()
    num_drafts = cu_num_logits.diff() - 1
    places = torch.arange(num_steps, device=drafts.device)
    rows = (starts[:, None] + places).clamp(max=len(drafts) - 1)
    kept = (stands[rows] & (places < num_drafts[:, None])).long().cumprod(dim=1).sum(dim=1)
    sampled = drafts.new_zeros(len(starts), num_steps + 1)
    sampled[:, :num_steps] = drafts[rows]
    sampled.scatter_(1, kept[:, None], own[starts + kept][:, None])
    return sampled, (kept + 1).to(torch.int32)
