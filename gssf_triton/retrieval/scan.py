"""Top-k lists and ranks in chunks of scores: memory grows with Q + N, never with Q·N.

The same chunks, in the same order, for every function: two passes over a gallery see the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gssf_triton.kernels import retrieval_configs
from gssf_triton.retrieval.order import (
    ARRAYS_PER_PLACE,
    Lists,
    absent,
    key_dtype,
    leading,
    order_keys,
    places,
    scores_of,
)
from gssf_triton.retrieval.scoring import Scores

#: Columns of a group. One vectorised pass takes the groups' maxima, and most groups need no further look. Lists longer
#: than LONG take more of every chunk: small groups leave out more of it.
GROUP, SMALL_GROUP, LONG = 64, 16, 32
#: A list of k is merged once every k · ITEMS_PER_PLACE items, or every MOST_CHUNKS chunks, or as many chunks as may be
#: held, whichever is sooner.
ITEMS_PER_PLACE, MOST_CHUNKS = 16, 4
#: If more than this share of the groups may matter, they are compared with the k-th largest maximum as well.
SMALL_SHARE = 1 / 8
#: If more than this share still may, the whole chunk is sorted.
LARGE_SHARE = 1 / 2


def _add_all(lists: Lists, rows: slice, S: Tensor, first: int, dropped: Tensor | None) -> None:
    """Merge the chunk S (r, c), whose columns are the items from `first` on, whatever it holds; −inf where dropped."""
    k = min(lists.keys.shape[1], S.shape[1])
    best, columns = leading(S, k)
    if bool(best[:, 0].isnan().any()) or bool((best[:, -1] == float("-inf")).any()):
        # NaN has no order, and a dropped item looks like a score of −inf: as integers they differ.
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
    """Merge what can be among the best; False, with nothing done, if that is too large a share, or more than a strip.

    Later items lose ties, so only scores strictly above a full list's last one matter (and NaN). And k groups of the
    chunk have maxima of their own, so nothing below the k-th of those matters; of few groups that says little. `padded`
    is the chunk, −inf where an item is dropped, its columns filled up with −inf to a multiple of GROUP.
    """
    k = lists.keys.shape[1]
    size = SMALL_GROUP if k > LONG else GROUP
    groups = padded.unflatten(1, (-1, size))
    best = groups.amax(-1)
    bar, missing = _bars(lists, rows)
    row, group = (best <= bar).logical_not_().nonzero(as_tuple=True)
    floor = None
    if row.numel() <= SMALL_SHARE * best.numel() or k > LARGE_SHARE * best.shape[1]:
        if bool(missing.any()):
            return False
    else:
        floor = best.topk(k, dim=1).values[:, -1:]
        # A dropped item looks like a score of −inf here.
        if bool((missing & (floor[:, 0] == float("-inf"))).any()):
            return False
        floor.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        row, group = ((best <= bar) | (best < floor)).logical_not_().nonzero(as_tuple=True)
        if row.numel() > LARGE_SHARE * best.numel():
            return False
    most = retrieval_configs.strip_rows(1, best.itemsize, best.device.type)
    if row.numel() * size > 4 * most:
        return False
    scores = groups[row, group]  # [hits, size]
    beaten = scores <= bar[row]
    if floor is not None:
        beaten |= scores < floor[row]
    if int(beaten.logical_not_().count_nonzero()) > most:
        return False
    hit, lane = beaten.nonzero(as_tuple=True)
    if hit.numel() == 0:
        return True
    keys, column, row = order_keys(scores[hit, lane]), group[hit] * size + lane, row[hit]
    among, place, count = row.unique_consecutive(return_inverse=True, return_counts=True)
    # Entries lie in order of row, then column: each becomes the next one of its row's list.
    slot = places(place, count)
    shape = (among.numel(), int(count.max()))
    if shape[0] * shape[1] > most:
        return False
    new_keys = keys.new_full(shape, absent(keys.dtype))
    new_indices = column.new_full(shape, -1)
    new_keys[place, slot] = keys
    new_indices[place, slot] = column + first
    lists.add(rows, new_keys, new_indices, among)
    return True


class Search(Scores):
    """The passes over a gallery, each over the same chunks."""

    def best_items(self, k: int) -> Lists:
        """The k best items of every query; indices count from the gallery's offset."""
        Q, columns, offset = self.query.shape[0], self.chunks.columns, self.query.offset
        lists = Lists.empty(Q, k, self.dtype, self.queries.device)
        if not Q * k:
            return lists
        chunk_bytes = min(self.chunks.rows, Q) * columns * self.dtype.itemsize
        most = retrieval_configs.chunks_held(chunk_bytes, self.queries.device.type)
        chunks = min(max(1, -(-k * ITEMS_PER_PLACE // columns)), MOST_CHUNKS, most)
        for block in self.blocks():
            for rows in self.rows():
                for span in block.parts(columns * chunks):
                    whole = self.scored(rows, block, span, GROUP)
                    for some, place in self.strips(rows, ARRAYS_PER_PLACE * k):
                        padded, dropped = whole[place], self.query.dropped(some, span)
                        S = padded[:, : span.stop - span.start]
                        if dropped is not None:
                            S.masked_fill_(dropped, float("-inf"))
                        if _add_better(lists, some, padded, offset + span.start):
                            continue
                        for few, there in self.strips(some, S.shape[1]):
                            left_out = None if dropped is None else dropped[there]
                            _add_all(lists, few, S[there], offset + span.start, left_out)
        self.forget()
        return lists

    def best_match(self) -> tuple[Tensor, Tensor]:
        """(key, index), each (Q,): every query's first match in the order of retrieval; −1 where it has none."""
        Q, device, integer = self.query.shape[0], self.queries.device, key_dtype(self.dtype)
        keys = torch.full((Q,), absent(integer), dtype=integer, device=device)
        indices = torch.full((Q,), -1, dtype=torch.int64, device=device)
        for block in self.blocks():
            for rows in self.rows():
                for part in block.parts(self.chunks.columns):
                    if not self.query.may_match(rows, part):
                        self.tick((rows.stop - rows.start) * (part.stop - part.start))
                        continue
                    S = self.scored(rows, block, part)
                    for some, place in self.strips(rows, S.shape[1]):
                        found = order_keys(S[place])
                        best, column = found.masked_fill_(~self.query.matches(some, part), absent(integer)).max(dim=1)
                        better = best > keys[some]
                        keys[some] = torch.where(better, best, keys[some])
                        indices[some] = torch.where(better, column + (self.query.offset + part.start), indices[some])
        return keys, indices

    def count_before(self, keys: Tensor, indices: Tensor) -> Tensor:
        """(Q,) int64: how many items come before the one of this key and index, each (Q,)."""
        counts = torch.zeros_like(indices)
        bars = scores_of(keys)
        for block in self.blocks():
            for rows in self.rows():
                any_nan = bool(bars[rows].isnan().any())
                for part in block.parts(self.chunks.columns):
                    whole = self.scored(rows, block, part)
                    number = torch.arange(part.start, part.stop, device=whole.device) + self.query.offset
                    for some, place in self.strips(rows, whole.shape[1]):
                        S, bar = whole[place], bars[some, None]
                        above = (bar >= S).logical_not_()  # NaN too
                        tied = bar == S
                        if any_nan:
                            at_nan = bar.isnan()
                            above &= ~at_nan
                            tied |= at_nan & S.isnan()
                        above |= tied.logical_and_(number < indices[some, None])
                        dropped = self.query.dropped(some, part)
                        if dropped is not None:
                            above &= ~dropped
                        counts[some] += above.view(torch.uint8).sum(dim=1, dtype=torch.int32)
        return counts
