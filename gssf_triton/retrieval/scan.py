"""Top-k lists and ranks in chunks of scores: memory grows with Q + N, never with Q·N.

The same chunks, in the same order, for every function: two passes over a gallery see the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gssf_triton.retrieval.order import absent, key_dtype, leading, merge, order_keys, scores_of
from gssf_triton.retrieval.scoring import Exclusions, Gallery, Scores, slices

#: Columns whose maximum is looked at before any of them is: one vectorised pass finds the few that matter. Long lists
#: take more from every chunk, and smaller groups leave more of it out.
GROUP, SMALL_GROUP = 64, 16
#: Lists that are long.
LONG = 32
#: A merge is worth its while every so many items a place of the list; but no more chunks than this wait for it.
ITEMS_PER_PLACE, MOST_CHUNKS = 16, 4
#: Of the groups, so many may hold something that matters and looking at them one by one is still cheap, …
SMALL_SHARE = 1 / 8
#: … or cheaper than sorting whole chunks.
LARGE_SHARE = 1 / 2


@dataclass
class Lists:
    """The k best items of every query so far: order keys and indices (Q, k), best first."""

    keys: Tensor
    indices: Tensor

    @classmethod
    def empty(cls, Q: int, k: int, dtype: torch.dtype, device: torch.device) -> Lists:
        integer = key_dtype(dtype)
        keys = torch.full((Q, k), absent(integer), dtype=integer, device=device)
        return cls(keys, torch.full((Q, k), -1, dtype=torch.int64, device=device))

    def result(self) -> tuple[Tensor, Tensor]:
        """(values, indices); −inf and −1 where too few items may be ranked."""
        return scores_of(self.keys), self.indices.masked_fill(self.keys == absent(self.keys.dtype), -1)

    def add(self, rows: slice, keys: Tensor, indices: Tensor, among: Tensor | None = None) -> None:
        """Merge further lists, all of later items, into these rows, or into the rows `among` these."""
        at = rows if among is None else among + rows.start
        k = self.keys.shape[1]
        self.keys[at], self.indices[at] = merge(
            torch.cat((self.keys[at], keys), dim=1), torch.cat((self.indices[at], indices), dim=1), k
        )


def _add_all(lists: Lists, rows: slice, S: Tensor, first: int, dropped: Tensor | None) -> None:
    """Merge the chunk S (r, c), whose columns are the items from `first` on, whatever it holds; −inf where dropped."""
    k = min(lists.keys.shape[1], S.shape[1])
    best, columns = leading(S, k)
    if bool(best[:, 0].isnan().any()) or bool((best[:, -1] == float("-inf")).any()):
        # NaN has no order, and a dropped item is not told from a score of −inf: integers are.
        keys = order_keys(S)
        if dropped is not None:
            keys.masked_fill_(dropped, absent(keys.dtype))
        best, columns = leading(keys, k)
    else:
        best = order_keys(best)
    lists.add(rows, best, columns + first)


def _bars(lists: Lists, rows: slice) -> tuple[Tensor, Tensor]:
    """(scores (r, 1) that later items must beat, NaN where a list is not full; whether any is not)."""
    last = lists.keys[rows, -1]
    missing = last == absent(last.dtype)
    # Against a NaN at the end of a list nothing wins.
    bars = scores_of(last).nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    return bars.masked_fill_(missing, float("nan"))[:, None], missing


def _add_better(lists: Lists, rows: slice, padded: Tensor, first: int) -> bool:
    """Merge what can be among the best; False, with nothing done, where that is not a small share.

    Later items lose ties, so only scores strictly above a full list's last one matter (and NaN). And k groups of the
    chunk have maxima of their own, so nothing below the k-th of those matters. `padded` is the chunk, −inf where an
    item is dropped, its columns filled up with −inf to a multiple of GROUP.
    """
    k = lists.keys.shape[1]
    size = SMALL_GROUP if k > LONG else GROUP
    groups = padded.unflatten(1, (-1, size))
    best = groups.amax(-1)
    bar, missing = _bars(lists, rows)
    row, group = (best <= bar).logical_not_().nonzero(as_tuple=True)
    floor = None
    if row.numel() > SMALL_SHARE * best.numel():
        if k > best.shape[1]:
            return False
        floor = best.topk(k, dim=1).values[:, -1:]
        # A dropped item is not told from a score of −inf here.
        if bool((missing & (floor[:, 0] == float("-inf"))).any()):
            return False
        floor.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        row, group = ((best <= bar) | (best < floor)).logical_not_().nonzero(as_tuple=True)
        if row.numel() > LARGE_SHARE * best.numel():
            return False
    elif bool(missing.any()):
        return False
    scores = groups[row, group]  # [hits, size]
    beaten = scores <= bar[row]
    if floor is not None:
        beaten |= scores < floor[row]
    hit, lane = beaten.logical_not_().nonzero(as_tuple=True)
    if hit.numel() == 0:
        return True
    keys, column, row = order_keys(scores[hit, lane]), group[hit] * size + lane, row[hit]
    among, place, count = row.unique_consecutive(return_inverse=True, return_counts=True)
    # Entries lie in order of row, then column: each becomes the next one of its row's list.
    slot = torch.arange(row.numel(), device=row.device) - (count.cumsum(0) - count)[place]
    shape = (among.numel(), int(count.max()))
    new_keys = keys.new_full(shape, absent(keys.dtype))
    new_indices = column.new_full(shape, -1)
    new_keys[place, slot] = keys
    new_indices[place, slot] = column + first
    lists.add(rows, new_keys, new_indices, among)
    return True


def topk(scores: Scores, gallery: Gallery, exclusions: Exclusions, k: int) -> Lists:
    """The k best items of every query; indices count from the gallery's offset."""
    Q, columns = scores.queries.shape[0], scores.chunks.columns
    lists = Lists.empty(Q, k, scores.dtype, scores.queries.device)
    # A long list is merged once in several chunks: in as many as it spans, at least.
    strip = columns * max(-(-k // columns), min(-(-k * ITEMS_PER_PLACE // columns), MOST_CHUNKS))
    width = -(-min(strip, len(gallery)) // GROUP) * GROUP
    buffer = torch.empty((min(scores.chunks.rows, Q), width), dtype=scores.dtype, device=scores.queries.device)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        scale = scores.scale(block)
        for rows in scores.rows():
            for span in slices(0, block.shape[0], strip):
                count = span.stop - span.start
                padded = buffer[: rows.stop - rows.start, : -(-count // GROUP) * GROUP]
                S = padded[:, :count]
                padded[:, count:] = float("-inf")
                for part in slices(span.start, span.stop, columns):
                    scores.fill(S[:, part.start - span.start : part.stop - span.start], rows, block, part, scale)
                index = gallery.offset + first + span.start
                local = slice(first + span.start, first + span.stop)
                dropped = exclusions.dropped(rows, local, gallery.offset)
                if dropped is not None:
                    S.masked_fill_(dropped, float("-inf"))
                if not _add_better(lists, rows, padded, index):
                    _add_all(lists, rows, S, index, dropped)
    return lists


def best_match(scores: Scores, gallery: Gallery, exclusions: Exclusions) -> tuple[Tensor, Tensor]:
    """(key, index), each (Q,): every query's first match in the order of retrieval; −1 where it has none."""
    Q, device = scores.queries.shape[0], scores.queries.device
    keys = torch.full((Q,), absent(key_dtype(scores.dtype)), dtype=key_dtype(scores.dtype), device=device)
    indices = torch.full((Q,), -1, dtype=torch.int64, device=device)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        scale = scores.scale(block)
        for rows in scores.rows():
            for part in slices(0, block.shape[0], scores.chunks.columns):
                local = slice(first + part.start, first + part.stop)
                if not exclusions.may_match(rows, local):
                    scores.tick((rows.stop - rows.start) * (part.stop - part.start))
                    continue
                S = chunk(scores, rows, block, part, scale)
                match = exclusions.same_id(rows, local)
                dropped = exclusions.dropped(rows, local, gallery.offset)
                if dropped is not None:
                    match &= ~dropped
                best, column = order_keys(S).masked_fill_(~match, absent(keys.dtype)).max(dim=1)
                better = best > keys[rows]
                keys[rows] = torch.where(better, best, keys[rows])
                indices[rows] = torch.where(better, column + (gallery.offset + local.start), indices[rows])
    return keys, indices


def count_before(scores: Scores, gallery: Gallery, exclusions: Exclusions, keys: Tensor, indices: Tensor) -> Tensor:
    """(Q,) int64: how many items come before the one of this key and index, each (Q,)."""
    counts = torch.zeros_like(indices)
    bars = scores_of(keys)
    for first, block in gallery.blocks(scores.chunks.block_rows):
        scale = scores.scale(block)
        for rows in scores.rows():
            bar, index = bars[rows, None], indices[rows, None]
            at_nan = bar.isnan()
            any_nan = bool(at_nan.any())
            for part in slices(0, block.shape[0], scores.chunks.columns):
                local = slice(first + part.start, first + part.stop)
                S = chunk(scores, rows, block, part, scale)
                number = torch.arange(local.start, local.stop, device=S.device) + gallery.offset
                above = (bar >= S).logical_not_()  # NaN too
                tied = bar == S
                if any_nan:
                    above &= ~at_nan
                    tied |= at_nan & S.isnan()
                above |= tied.logical_and_(number < index)
                dropped = exclusions.dropped(rows, local, gallery.offset)
                if dropped is not None:
                    above &= ~dropped
                counts[rows] += above.view(torch.uint8).sum(dim=1, dtype=torch.int32)
    return counts


def chunk(scores: Scores, rows: slice, block: Tensor, part: slice, scale: Tensor | None) -> Tensor:
    """A fresh chunk of scores, (r, c)."""
    shape = (rows.stop - rows.start, part.stop - part.start)
    out = torch.empty(shape, dtype=scores.dtype, device=block.device)
    return scores.fill(out, rows, block, part, scale)
