"""The metric's weights as a module's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gssf_triton import checks

#: Blocks are at most as large as nn.GSSF's default block where no size is given.
LARGEST_DEFAULT_BLOCK = 32


@dataclass(frozen=True)
class Learned:
    """Which terms of a metric a module learns, the blocks' size, and the weights' device and dtype."""

    diag: bool
    blocks: bool
    block_size: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None

    def check(self, channels: int, of: str, *, may_choose: bool) -> None:
        """`of` says in words which channels the blocks must divide; `may_choose`: a block size of None is allowed."""
        checks.check_terms(self.diag, self.blocks)
        checks.check_place(self.device, self.dtype)
        if self.blocks and not (may_choose and self.block_size is None):
            checks.check_block_size("block_size", self.block_size, channels, of)

    def add_to(self, module: nn.Module, channels: int, *lead: int) -> None:
        """Parameters W_diag (*lead, D) and W_blocks (*lead, G, B, B) at the identity, None where not learned.

        Without a block size it is the largest divisor of D up to `LARGEST_DEFAULT_BLOCK`.
        """
        size = self.block_size
        if size is None:
            size = max(size for size in range(1, LARGEST_DEFAULT_BLOCK + 1) if channels % size == 0)
        for name, learned, shape in (
            ("W_diag", self.diag, (channels,)),
            ("W_blocks", self.blocks, (channels // size, size, size)),
        ):
            weight = torch.empty(*lead, *shape, device=self.device, dtype=self.dtype) if learned else None
            module.register_parameter(name, None if weight is None else nn.Parameter(weight))
        reset_metric(module)


@torch.no_grad()
def fill_identity(W_diag: Tensor | None, W_blocks: Tensor | None) -> None:
    """1 on the diagonal and 0 in the blocks, or the identity there where no diagonal is learned."""
    if W_diag is not None:
        W_diag.fill_(1.0)
    if W_blocks is not None:
        W_blocks.zero_()
        if W_diag is None:
            W_blocks.diagonal(dim1=-2, dim2=-1).fill_(1.0)


def reset_metric(module: nn.Module) -> None:
    fill_identity(module._parameters["W_diag"], module._parameters["W_blocks"])


def repr_of_weights(module: nn.Module) -> str:
    shapes = {name: getattr(module, name) for name in ("W_diag", "W_blocks")}
    return ", ".join(f"{name}={None if w is None else tuple(w.shape)}" for name, w in shapes.items())
