"""The rank of every match of every query, for metrics that need more than the first: average precision and its kin.

Two passes over the same chunks: the match scores of a batch of queries, sorted; then, for every item, how many of them
it comes before. Queries with many matches, where that takes longer than sorting all items, are sorted, a few at a time.
Memory grows with the number of matches, never with Q·N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gssf_triton.kernels.retrieval_configs import FEW_MATCHES, NUMPY_SORT_THREADS, sorted_rows
from gssf_triton.retrieval.order import absent, order_keys, places
from gssf_triton.retrieval.scoring import Block, Scores
from gssf_triton.slices import slices


@dataclass(frozen=True)
class Matches:
    """The matches of some queries, worst first: order keys and indices (r, m), and how many each query has (r,).

    Behind a query's matches lie the largest key and index −1, which no item comes before.
    """

    keys: Tensor
    indices: Tensor
    counts: Tensor

    def of(self, rows: slice) -> Matches:
        return Matches(self.keys[rows], self.indices[rows], self.counts[rows])


def _collect(scores: Scores, block: Block, rows: slice) -> Matches:
    query, found = scores.query, []
    for part in block.parts(scores.chunks.columns):
        if query.may_match(rows, part):
            S = scores.scored(rows, block, part)
            for some, place in scores.strips(rows, S.shape[1]):
                row, column = query.matches(some, part).nonzero(as_tuple=True)
                found.append((row + place.start, column + part.start, order_keys(S[place][row, column])))
    many, device = rows.stop - rows.start, scores.queries.device
    if not found:
        nothing = torch.zeros((many, 0), dtype=torch.int64, device=device)
        return Matches(nothing, nothing, nothing.sum(1))
    row, index, keys = (torch.cat(parts) for parts in zip(*found, strict=True))
    # Worst first: by row, then key, then the higher index, one stable sort for each, the last of them first.
    order = index.argsort(descending=True, stable=True)
    order = order[keys[order].argsort(stable=True)]
    order = order[row[order].argsort(stable=True)]
    row, index, keys = row[order], index[order], keys[order]
    counts = torch.bincount(row, minlength=many)
    slot, shape = places(row, counts), (many, int(counts.max()))
    matches = Matches(
        torch.full(shape, torch.iinfo(keys.dtype).max, dtype=keys.dtype, device=device),
        torch.full(shape, -1, dtype=torch.int64, device=device),
        counts,
    )
    matches.keys[row, slot], matches.indices[row, slot] = keys, index
    return matches


def _beaten(matches: Matches, keys: Tensor, first: int) -> Tensor:
    """(r, c): how many of its row's matches each item comes before; the items are those from index `first` on."""
    below = torch.searchsorted(matches.keys, keys, out_int32=True)
    not_above = torch.searchsorted(matches.keys, keys, right=True, out_int32=True)
    row, column = (below != not_above).nonzero(as_tuple=True)
    # Among equal keys the higher indices come first here: find where those of later items than this one end.
    index = column + first
    low, high = below[row, column].long(), not_above[row, column].long()
    last = matches.keys.shape[1] - 1
    for _ in range((last + 1).bit_length()):
        middle = (low + high) // 2
        later = (low < high) & (matches.indices[row, middle.clamp_max(last)] > index)
        low, high = torch.where(later, middle + 1, low), torch.where(later | (low >= high), high, middle)
    below[row, column] = low.to(below.dtype)
    return below


def _most_matches(query_ids: Tensor, gallery_ids: Tensor) -> int:
    """How many items one of these queries has the id of at most; the gallery's ids (N,) are in order."""
    query_ids = query_ids.contiguous()
    first, behind = (torch.searchsorted(gallery_ids, query_ids, right=right) for right in (False, True))
    return int((behind - first).max())


def _by_counting(scores: Scores, block: Block, rows: slice) -> tuple[Tensor, Tensor]:
    """`match_ranks` of these queries: every item is looked up among each query's matches."""
    matches, device = _collect(scores, block, rows), scores.queries.device
    many, most = matches.keys.shape
    if most == 0:
        return matches.indices, matches.counts
    # bins[i, b]: items that come before exactly the b worst of query i's matches.
    bins = torch.zeros((many, most + 1), dtype=torch.int64, device=device)
    start = torch.arange(0, bins.numel(), most + 1, dtype=torch.int32, device=device)[:, None]
    for part in block.parts(scores.chunks.columns):
        S = scores.scored(rows, block, part)
        for some, place in scores.strips(rows, S.shape[1]):
            beaten = _beaten(matches.of(place), order_keys(S[place]), part.start)
            dropped = scores.query.dropped(some, part)
            if dropped is not None:
                beaten.masked_fill_(dropped, 0)
            counted = bins[place]
            beaten += start[: counted.shape[0]]
            counted += torch.bincount(beaten.flatten(), minlength=counted.numel()).view_as(counted)
    # Before the match at place p come the items that beat more than p matches: the best match lies last.
    before = bins.flip(1).cumsum(1)[:, :most]  # [r, m]: column c holds the items that beat at least m - c
    best = torch.arange(most, device=device)[None] + (most - matches.counts)[:, None]
    return before.gather(1, best.clamp_max(most - 1)), matches.counts


def _sorted_matches(keys: Tensor, match: Tensor) -> Tensor:
    """`match` (r, N) in the order of retrieval of `keys` (r, N), which may be overwritten."""
    if keys.dtype == torch.int64:
        return match.gather(1, keys.sort(dim=1, descending=True, stable=True).indices)
    # One number an item: the key, best first; below it the index; last, whether it matches. No two are equal.
    items = keys.bitwise_not_().long().mul_(2**32)
    items += torch.arange(0, 2 * keys.shape[1], 2, device=keys.device)
    items[match] += 1
    if items.device.type == "cpu" and torch.get_num_threads() <= NUMPY_SORT_THREADS:
        items.numpy().sort(axis=1)
    else:
        items = items.sort(dim=1).values
    return items.bitwise_and_(1).bool()


def _by_sorting(scores: Scores, block: Block, rows: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`match_ranks` of these queries: all items in order."""
    query, every = scores.query, slice(block.first, block.first + block.items.shape[0])
    S = scores.scored(rows, block, every)
    for some, place in scores.strips(rows, S.shape[1]):
        keys, dropped = order_keys(S[place]), query.dropped(some, every)
        if dropped is not None:
            keys.masked_fill_(dropped, absent(keys.dtype))
        in_order = _sorted_matches(keys, query.matches(some, every))
        counts = in_order.sum(1)
        row, rank = in_order.nonzero(as_tuple=True)
        ranks = torch.zeros((counts.shape[0], int(counts.max())), dtype=torch.int64, device=counts.device)
        ranks[row, places(row, counts)] = rank
        yield some, ranks, counts


def match_ranks(
    scores: Scores, progress: Callable[[Iterator[slice]], Iterator[slice]]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For batches of queries: (their rows, the ranks of their matches (r, m), how many matches each has (r,)).

    A rank counts the items before a match, the other matches included, in the order of retrieval: ascending, from 0.
    Behind a query's matches lie ranks that mean nothing. The gallery is a tensor, with ids.
    """
    (block,) = scores.blocks()
    query_ids, gallery_ids = scores.query.query_ids, scores.query.gallery_ids
    assert query_ids is not None and gallery_ids is not None
    ordered, few = gallery_ids.sort().values, sorted_rows(block.items.shape[0], block.items.device.type)
    for rows in progress(scores.rows()):
        if _most_matches(query_ids[rows], ordered) <= FEW_MATCHES:
            yield rows, *_by_counting(scores, block, rows)
            continue
        for some in slices(rows.start, rows.stop, few):
            yield from _by_sorting(scores, block, some)
