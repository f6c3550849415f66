"""A batch spread over the processes of a `torch.distributed` group: every process holds its part of the pairs.

The loss is that of the whole batch, on every process. Each process's gradients are the number of processes times its
own part's, as DistributedDataParallel and FSDP expect: they average over processes, and the average is the gradient
of the whole batch. Features travel by one all-gather; parts may be of unequal length, empty ones included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton.streaming.epilogues import Merge


@dataclass(frozen=True)
class Ranks:
    """Who holds which pairs: `sizes` one a process, this one's `index`. No group: one process, all pairs."""

    group: dist.ProcessGroup | None
    sizes: tuple[int, ...]
    index: int

    @property
    def count(self) -> int:
        return len(self.sizes)

    @property
    def offset(self) -> int:
        """Pairs of the processes before this one."""
        return sum(self.sizes[: self.index])

    @property
    def pairs(self) -> int:
        """Pairs of the whole batch."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.sizes[self.index])

    @staticmethod
    def of(group: dist.ProcessGroup | None, size: int, device: torch.device) -> Ranks:
        if group is None:
            return Ranks(None, (size,), 0)
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed process group or None, got {type(group).__name__}")
        mine = torch.tensor([size], device=device)
        sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, mine, group=group)
        return Ranks(group, tuple(int(x) for x in torch.cat(sizes).tolist()), dist.get_rank(group))

    def gather(self, x: Tensor) -> Tensor:
        """x (own, …) of every process, in their order: (pairs, …). Not differentiable; see `gather_rows`."""
        if self.group is None:
            return x
        # Collectives want equal shapes: parts travel padded to the longest.
        padded = x.new_zeros((max(self.sizes), *x.shape[1:]))
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def merge(self, state: Tensor, merge: Merge) -> Tensor:
        """The processes' states (outputs, length) of the same columns as one, merged in their order."""
        if self.group is None:
            return state
        states = [torch.empty_like(state) for _ in self.sizes]
        dist.all_gather(states, state.contiguous(), group=self.group)
        merged = states[0]
        for other in states[1:]:
            merged = merge(merged, other)
        return merged

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the processes, added in their order, so that every one of them gets the same bits."""
        if self.group is None:
            return x
        parts = [torch.empty_like(x) for _ in self.sizes]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts).sum(0)


class _GatherRows(torch.autograd.Function):
    """Every process's rows; backward, the sum over processes of what each says of this process's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.own], None


def gather_rows(x: Tensor, ranks: Ranks) -> Tensor:
    """x (own, D) of every process, (pairs, D), differentiable."""
    if ranks.group is None:
        return x
    gathered: Tensor = _GatherRows.apply(x, ranks)
    return gathered
