"""Items of many rows (an image's regions, a caption's words) in batches that leave the padding out.

A mask is any pattern of booleans. Packed, an item's valid rows come first, in their order, and the items come longest
first: then a batch of neighbours needs only as many rows as its longest item has. On the CPU padding therefore costs
nothing; on a GPU reading the lengths would wait for the device, so there the rows are only put in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemBatch:
    """Items start … stop - 1 of a packing, `extent` rows of each."""

    start: int
    stop: int
    extent: int

    @property
    def items(self) -> slice:
        return slice(self.start, self.stop)

    def __len__(self) -> int:
        return self.stop - self.start


class Packing:
    """The order of items and of the rows in them, for features (items, rows, D) with a mask (items, rows) or None."""

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self.count, self.rows = x.shape[0], x.shape[1]
        self.order: Tensor | None = None
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.extents: list[int] | None = None
        if mask is None:
            return
        lengths = mask.sum(1)
        self.order = torch.argsort(lengths, descending=True, stable=True)
        lengths = lengths[self.order]
        self.slots = torch.argsort(mask.logical_not(), dim=1, stable=True)[self.order]
        self.valid = torch.arange(self.rows, device=x.device) < lengths[:, None]
        if x.device.type == "cpu":
            self.extents = lengths.tolist()

    def batches(self, rows: int) -> Iterator[ItemBatch]:
        """Batches of about `rows` rows each, one item at least; items without a valid row are left out."""
        start = 0
        while start < self.count:
            extent = self.rows if self.extents is None else self.extents[start]
            if extent == 0:
                return
            stop = min(self.count, start + max(1, rows // extent))
            yield ItemBatch(start, stop, extent)
            start = stop

    def load(self, x: Tensor, batch: ItemBatch, dtype: torch.dtype) -> Tensor:
        """The batch's rows (items, extent, D) in `dtype`; padding is zeroed, so that its content has no effect."""
        if self.order is None:
            return x[batch.items].to(dtype)
        assert self.slots is not None and self.valid is not None
        slots = self.slots[batch.items, : batch.extent]
        rows = x[self.order[batch.items, None], slots].to(dtype)
        return rows.masked_fill_(self.valid[batch.items, : batch.extent, None].logical_not(), 0)

    def store(self, out: Tensor, batch: ItemBatch, values: Tensor) -> None:
        """Write the batch's rows where they belong in `out` (items, rows, D), padding as zeros."""
        if self.order is None:
            out[batch.items] = values.to(out.dtype)
            return
        assert self.slots is not None and self.valid is not None
        values = values.masked_fill(self.valid[batch.items, : batch.extent, None].logical_not(), 0)
        out[self.order[batch.items, None], self.slots[batch.items, : batch.extent]] = values.to(out.dtype)

    def padding(self, batch: ItemBatch) -> Tensor | None:
        """True where a row of the batch is padding, (items, extent); None where none can be."""
        return None if self.valid is None else self.valid[batch.items, : batch.extent].logical_not()

    def shares(self, batch: ItemBatch, like: Tensor, mean: bool) -> Tensor:
        """What each row counts in the sum or the mean over its item, (items, extent), in like's dtype; padding 0."""
        if self.valid is None:
            return like.new_full((len(batch), batch.extent), 1 / self.rows if mean else 1.0)
        valid = self.valid[batch.items, : batch.extent].to(like.dtype)
        return valid / valid.sum(1, keepdim=True).clamp_min(1) if mean else valid


def reorder(scores: Tensor, rows: Packing, columns: Packing, *, back: bool = False) -> Tensor:
    """Scores (items, items) in the packings' order, or `back` from it."""
    for dim, packing in enumerate((rows, columns)):
        if packing.order is not None:
            scores = scores.index_select(dim, torch.argsort(packing.order) if back else packing.order)
    return scores
