"""A greedy cover of similar vectors, with the whole graph in memory: see `codebook.build`."""

import torch

from vllm_kvcompress.kernels.codebook.book import SHORTEST, Codebook, check_vectors


def build_codebook(
    vectors: torch.Tensor, num_vectors: torch.Tensor, threshold: float, max_entries: int
) -> Codebook:
    """As `codebook.build.build_codebook`."""
    check_vectors(vectors, num_vectors, max_entries)
    num_problems, num_places, _ = vectors.shape
    rows = torch.zeros(num_problems, num_places, device=vectors.device)
    magnitude, cosine = rows, rows.clone()
    index = torch.full_like(rows, -1, dtype=torch.int32)
    entries = index.new_full((num_problems, max_entries), -1)
    num_entries, num_forced = index.new_zeros(num_problems), index.new_zeros(num_problems)
    for problem, count in enumerate(num_vectors.tolist()):
        exact = vectors[problem, :count].float()
        length = exact.norm(dim=1)
        length[length < SHORTEST] = 0
        unit = torch.where(length[:, None] > 0, exact / length[:, None], 0.0)
        cosines = (unit @ unit.T).clamp(-1, 1)
        graph = (cosines > threshold) | _identical(exact)
        graph |= (length == 0)[:, None] & (length == 0)
        chosen, numbers = _cover(graph, max_entries)
        left = numbers < 0
        if left.any():
            numbers[left] = cosines[left][:, chosen].argmax(dim=1).int()
        members = torch.tensor(chosen, dtype=torch.long, device=vectors.device)[numbers]
        near = cosines.gather(1, members[:, None])[:, 0]
        own = members == torch.arange(count, device=vectors.device)
        near[own | ((length == 0) & (length[members] == 0))] = 1
        magnitude[problem, :count], cosine[problem, :count] = length, near
        index[problem, :count] = numbers
        entries[problem, : len(chosen)] = index.new_tensor(chosen)
        num_entries[problem], num_forced[problem] = len(chosen), left.sum()
    return Codebook(entries, num_entries, index, magnitude, cosine, num_forced)


def _identical(vectors: torch.Tensor) -> torch.Tensor:
    """[n, n] bool, whether all elements are equal."""
    if not len(vectors):
        return torch.zeros(0, 0, dtype=torch.bool, device=vectors.device)
    names = torch.unique(vectors + 0.0, dim=0, return_inverse=True)[1]  # + 0.0: -0 equals 0
    return names[:, None] == names


def _cover(graph: torch.Tensor, max_entries: int) -> tuple[list[int], torch.Tensor]:
    """Places of the entries, and [n] int32 entry numbers, -1 where the book was full."""
    left = torch.ones(len(graph), dtype=torch.bool, device=graph.device)
    numbers = torch.full_like(left, -1, dtype=torch.int32)
    degree, chosen = graph.sum(dim=0, dtype=torch.int32), list[int]()
    while len(chosen) < max_entries and left.any():
        most = degree.max()
        if most == 1:  # those that are left have only themselves
            alone = left.nonzero()[: max_entries - len(chosen), 0]
            numbers[alone] = len(chosen) + torch.arange(len(alone)).to(numbers)
            return chosen + alone.tolist(), numbers
        place = int((degree == most).nonzero()[0])
        covered = graph[place] & left
        numbers[covered] = len(chosen)
        left &= ~covered
        lost = graph[covered].sum(dim=0, dtype=torch.int32)
        degree = torch.where(left, degree - lost, 0)
        chosen.append(place)
    return chosen, numbers
