"""The passes of a search by the Triton kernels, each of them one launch a block of the gallery."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gssf_triton import kernels
from gssf_triton.kernels.retrieval_configs import LARGEST_KERNEL_K
from gssf_triton.metric import IDENTITY
from gssf_triton.precision import float16_unit
from gssf_triton.retrieval.order import Lists
from gssf_triton.retrieval.scan import Search

if TYPE_CHECKING:
    from gssf_triton.kernels.ranked_tile import Marks


class TritonSearch(Search):
    """As `Search`. float64 and lists that no kernel holds are found in chunks of scores, as there."""

    def operands(self, folded: Tensor) -> Tensor:
        dtype = self.query.queries.dtype
        #: What float16 queries were divided by, powers of two (Q, 1), and scores with them: no rank changes.
        self.units: Tensor | None = None
        if dtype == torch.float16:
            self.units, self.headroom = float16_unit(folded, dim=1), 1.0
            folded = folded / self.units
        return (folded / self.headroom).to(dtype)

    def values(self, scores: Tensor) -> Tensor:
        return scores if self.units is None else scores * self.units

    def multiply(self, queries: Tensor, items: Tensor, out: Tensor) -> None:
        kernels.pairwise.pairwise(queries[None], items[None], IDENTITY, False, out[None, :, : items.shape[0]])

    def _launches(self) -> Iterator[tuple[Tensor, Tensor, Marks, int]]:
        """What a kernel takes, block by block: queries, items, marks, the first item's index."""
        query = self.query
        if not self.queries.shape[0]:
            return

        def plain(labels: Tensor | None, columns: slice | None = None) -> Tensor | None:
            return None if labels is None else labels[columns or slice(None)].contiguous()

        for block in self.blocks():
            columns = slice(block.first, block.first + block.items.shape[0])
            mask = None if query.mask is None else query.mask[:, columns].view(torch.uint8)
            marks = kernels.ranked_tile.Marks(
                block.scale, plain(query.exclude), mask,
                plain(query.query_ids), plain(query.gallery_ids, columns),
                plain(query.query_cams), plain(query.gallery_cams, columns),
            )  # fmt: skip
            yield self.queries, block.items, marks, query.offset + block.first
            self.tick(self.queries.shape[0] * block.items.shape[0])

    def best_items(self, k: int) -> Lists:
        Q = self.queries.shape[0]
        if not Q * k or k > LARGEST_KERNEL_K or self.dtype != torch.float32:
            return super().best_items(k)
        lists = Lists.empty(Q, k, self.dtype, self.queries.device)
        for launch in self._launches():
            keys = kernels.topk.largest_keys(*launch, k)
            lists.add(slice(0, Q), *kernels.ranked_tile.split_keys(keys))
        return lists

    def best_match(self) -> tuple[Tensor, Tensor]:
        if self.dtype != torch.float32:
            return super().best_match()
        best = self.queries.new_full((self.queries.shape[0],), kernels.ranked_tile.ABSENT.value, dtype=torch.int64)
        for launch in self._launches():
            best = torch.maximum(best, kernels.rank.best_matches(*launch))
        return kernels.ranked_tile.split_keys(best)

    def count_before(self, keys: Tensor, indices: Tensor) -> Tensor:
        if self.dtype != torch.float32:
            return super().count_before(keys, indices)
        bar = kernels.ranked_tile.join_keys(keys, indices)
        counts = torch.zeros_like(bar)
        for launch in self._launches():
            counts += kernels.rank.counts_above(*launch, bar)
        return counts
