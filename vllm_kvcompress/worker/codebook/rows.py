"""Which requests have a codebook, and which rows of a step's batch read them.

Dimensions: G KV cache groups, S request rows, P blocks of a block table row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_kvcompress.kernels.host_copy import send_together
from vllm_kvcompress.plans import BookLengths
from vllm_kvcompress.worker.codebook.reader import CodedRows
from vllm_kvcompress.worker.host_mirror import HostMirror


class RequestBooks:
    """Sizes of the codebooks of all request rows, and which rows of the step's batch read them.

    Parameters
    ----------
    num_groups, max_num_reqs : int
        G and S.
    device : torch.device
        Where batches are.

    Attributes
    ----------
    rows : dict[int, CodedRows]
        Of the current step, by KV cache group; groups without a codebook in the batch are absent.
    """

    def __init__(self, num_groups: int, max_num_reqs: int, device: torch.device) -> None:
        # Coded tokens, slots for entries, slots of the whole book.
        self._sizes = UvaBackedTensor((3, num_groups, max_num_reqs), dtype=torch.int32)
        self.device = device
        self.rows: dict[int, CodedRows] = {}
        self._coded: set[int] = set()  # request rows that have a codebook
        self._dirty = False

    def reset_row(self, req_index: int) -> None:
        """A row starts over, without a codebook."""
        if req_index in self._coded:
            self._coded.discard(req_index)
            self._sizes.np[:, :, req_index] = 0
            self._dirty = True

    def set_book(self, group: int, req_index: int, book: BookLengths) -> None:
        """A row's blocks begin with this codebook from now on."""
        self._sizes.np[:, group, req_index] = book.num_tokens, book.num_entries, book.num_slots
        self._coded.add(req_index)
        self._dirty = True

    def has_book(self, idx_mapping_np: np.ndarray) -> bool:
        """Whether a request of the batch has a codebook in any group."""
        return bool(self._coded) and bool(self._sizes.np[0][:, idx_mapping_np].any())

    def begin_batch(
        self,
        input_batch: InputBatch,
        evicted: HostMirror,
        block_tables: Sequence[torch.Tensor],
        block_sizes: Sequence[int],
    ) -> None:
        """Find the rows that read codebooks.

        Parameters
        ----------
        input_batch : InputBatch
            A real batch.
        evicted : HostMirror
            [G, S] int32, slots that rows have given up, on the device too.
        block_tables : sequence of torch.Tensor
            G tables [S, P] int32.
        block_sizes : sequence of int
            Tokens per block of each group.
        """
        if self._dirty:
            self._sizes.copy_to_uva()
            self._dirty = False
        self.rows = {}
        if not self._coded:
            return
        requests_np = input_batch.idx_mapping_np[: input_batch.num_reqs]
        is_coded = self._sizes.np[0][:, requests_np] > 0  # [G, requests]
        coded = np.flatnonzero(is_coded.any(axis=0))
        if not len(coded):
            return
        requests_np = requests_np[coded]
        starts = input_batch.query_start_loc_np
        counts = starts[coded + 1] - starts[coded]
        places = [np.arange(starts[each], starts[each + 1]) for each in coded]
        tokens, requests = send_together(
            [np.concatenate(places, dtype=np.int64), np.repeat(requests_np, counts)], self.device
        )
        # For all groups at once: every operation is a launch.
        num_coded, num_entries, first_slot = self._sizes.gpu[:, :, requests]
        held = input_batch.positions[tokens].int() + 1 - evicted.gpu[:, requests]
        num_tail = held - first_slot
        # On the host lengths may be known as upper bounds only.
        bounds = input_batch.seq_lens_cpu_upper_bound.numpy()[coded] - evicted.np[:, requests_np]
        sizes = self._sizes.np[:, :, requests_np]
        for group in np.flatnonzero(is_coded.any(axis=1)):
            table, block_size = block_tables[group], block_sizes[group]
            width = min(-(-int(bounds[group].max()) // block_size), table.shape[1])
            table = table[:, :width][requests]
            first_code = num_entries[group] // block_size
            columns = torch.arange(width, device=self.device) + first_code[:, None]
            self.rows[int(group)] = CodedRows(
                batch_rows=coded,
                tokens=tokens,
                table=table,
                code_table=table.gather(1, columns.clamp(max=width - 1).long()),
                num_entries=num_entries[group],
                num_coded=num_coded[group],
                first_slot=first_slot[group],
                num_tail=num_tail[group],
                max_entries=int(sizes[1, group].max()),
                max_coded=int(sizes[0, group].max()),
                max_tail=int((bounds[group] - sizes[2, group]).max()),
            )

    def end_batch(self) -> None:
        """The step is over; what runs between steps reads no codebooks."""
        if self.rows:
            self.rows = {}
