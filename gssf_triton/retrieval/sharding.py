"""A gallery cut into shards, one a process: each process ranks its own, and the answers are merged exactly.

Every process of the group calls with the same queries and its own shard, and gets the whole answer. Indices count
through the shards in order of rank. What travels is Q·k keys and indices, or Q of them, never a score matrix.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from gssf_triton.processes import agree, gather_alike, kind
from gssf_triton.retrieval.order import ARRAYS_PER_PLACE, Lists, absent, merge
from gssf_triton.retrieval.query import LABELS, Query


def place(query: Query, group: dist.ProcessGroup, **call: object) -> tuple[int, int]:
    """(index of this shard's first item, items in all shards); `call` is what else all processes must agree on.

    Raises:
        ValueError: on every process alike, where their calls differ.
    """
    items, queries = query.shape[1], query.queries
    call |= {"queries": tuple(queries.shape), "dtype": queries.dtype}
    call |= {"W_diag": kind(query.W_diag), "W_blocks": kind(query.W_blocks)}
    call |= {name: getattr(query, name) is not None for name in LABELS}
    sizes = [size for (size,) in agree(group, (items,), queries.device, call)]
    return sum(sizes[: dist.get_rank(group)]), sum(sizes)


def merge_lists(lists: Lists, k: int, group: dist.ProcessGroup) -> Lists:
    """The k best items of all shards, in the lists' place; a shard smaller than k gives what it has."""
    (Q, found), merged = lists.keys.shape, lists
    if found < k:
        merged = Lists(lists.keys.new_full((Q, k), absent(lists.keys.dtype)), lists.indices.new_full((Q, k), -1))
        merged.keys[:, :found], merged.indices[:, :found] = lists.keys, lists.indices
    for rows in merged.strips(ARRAYS_PER_PLACE * k * dist.get_world_size(group)):
        # Shards lie in the order of their indices, so equal keys do too.
        keys, indices = (gather_alike(x[rows], group).transpose(0, 1).flatten(1) for x in (merged.keys, merged.indices))
        merged.keys[rows], merged.indices[rows] = merge(keys, indices, k)
    return merged


def merge_best(keys: Tensor, indices: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The best of the shards' best matches."""
    best = merge_lists(Lists(keys[:, None], indices[:, None]), 1, group)
    return best.keys[:, 0], best.indices[:, 0]
