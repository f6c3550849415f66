"""A batch spread over the processes of a `torch.distributed` group: every process holds its part of the pairs.

The scalar loss is that of the whole batch, the same bits on every process. Gradients assume the reduction of
DistributedDataParallel and FSDP, the mean over processes: each process's are those of the sum of all processes'
losses, and the mean of these is the gradient of the whole batch's loss. Where there is no such mean, as for a leaf that
only one process holds, divide by the number of processes.

Features travel by one all-gather forward and one all-reduce backward; parts may be of unequal length, empty ones
included. A process that dies, or calls with other arguments, ends the call on all others with an error: collectives
fail when a connection closes or the group's own timeout runs out, and the calls are compared before any features
travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton.kernels.stream_values import Merge
from gssf_triton.processes import agree, gather_alike


@dataclass(frozen=True)
class Parts:
    """A batch in parts: `sizes` one a process, this one's `index`. No group: one process, all rows."""

    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]
    index: int

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def pairs(self) -> int:
        """Rows of the whole batch."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """This process's rows of the whole batch."""
        if self.group is None:
            # No size in it: up to torch 2.10 the compiler cannot carry one from a forward pass to its backward pass.
            return slice(0, None)
        start = sum(self.sizes[: self.index])
        return slice(start, start + self.sizes[self.index])

    def gather(self, x: Tensor) -> Tensor:
        """x (own, …) of every process, in their order: (pairs, …). Not differentiable."""
        if self.group is None:
            return x
        # Collectives want equal shapes: parts travel padded to the longest. They write in place, without a gradient.
        longest = max(self.sizes)
        padded = x = x.detach()
        if x.shape[0] < longest:
            padded = x.new_zeros((longest, *x.shape[1:]))
            padded[: x.shape[0]] = x
        parts = gather_alike(padded, self.group)
        if min(self.sizes) == longest:
            return parts.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def merge(self, state: Tensor, merge: Merge) -> Tensor:
        """The processes' states (outputs, length) of the same columns as one, merged in their order."""
        if self.group is None:
            return state
        first, *others = gather_alike(state, self.group)
        for other in others:
            first = merge(first, other)
        return first

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the processes of something small, added in their order: every one of them gets the same bits."""
        return x if self.group is None else gather_alike(x, self.group).sum(0)

    def max(self, x: Any) -> Any:
        """The largest of the processes' x, (); x itself, which may be None, of one process."""
        return x if self.group is None else gather_alike(x, self.group).amax(0)

    def sum_own(self, x: Tensor) -> Tensor:
        """Σ over the processes of x (pairs, …), of which this process keeps its own rows."""
        if self.group is None:
            return x
        total = x.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total[self.own]


def spread(
    group: dist.ProcessGroup | None, sizes: tuple[int, ...], device: torch.device, call: Mapping[str, object]
) -> tuple[Parts, ...]:
    """How each of this process's `sizes` adds up with the others'; `call` is what all processes must agree on.

    Raises:
        ValueError: on every process alike, where their calls differ.
    """
    if group is None:
        return tuple(Parts(None, (size,), 0) for size in sizes)
    rows, index = agree(group, sizes, device, call), dist.get_rank(group)
    return tuple(Parts(group, of_all, index) for of_all in zip(*rows, strict=True))
