"""A gallery cut into shards, one a process: each process ranks its own, and the answers are merged exactly.

Every process of the group calls with the same queries and its own shard, and gets the whole answer. Indices count
through the shards in order of rank. What travels is Q·k keys and indices, or Q of them, never a score matrix.
"""

from __future__ import annotations

from dataclasses import fields

import torch.distributed as dist
from torch import Tensor

from gssf_triton.processes import agree, gather_alike, kind
from gssf_triton.retrieval.order import absent, merge
from gssf_triton.retrieval.scan import Lists
from gssf_triton.retrieval.scoring import Exclusions


def place(
    queries: Tensor,
    items: int,
    W_diag: Tensor | None,
    W_blocks: Tensor | None,
    exclusions: Exclusions,
    group: dist.ProcessGroup | None,
    **call: object,
) -> tuple[int, int]:
    """(index of this shard's first item, items in all shards); `call` is what else all processes must agree on.

    Raises:
        ValueError: on every process alike, where their calls differ.
    """
    if group is None:
        return 0, items
    given = {field.name: getattr(exclusions, field.name) is not None for field in fields(exclusions)}
    features = {"queries": tuple(queries.shape), "dtype": queries.dtype}
    weights = {"W_diag": kind(W_diag), "W_blocks": kind(W_blocks)}
    sizes = [size for (size,) in agree(group, (items,), queries.device, {**call, **features, **weights, **given})]
    return sum(sizes[: dist.get_rank(group)]), sum(sizes)


def merge_lists(lists: Lists, k: int, group: dist.ProcessGroup | None) -> Lists:
    """The k best items of all shards; a shard smaller than k gives what it has."""
    if group is None:
        return lists
    Q, found = lists.keys.shape
    keys = lists.keys.new_full((Q, k), absent(lists.keys.dtype))
    indices = lists.indices.new_full((Q, k), -1)
    keys[:, :found], indices[:, :found] = lists.keys, lists.indices
    # Shards lie in the order of their indices, so equal keys do too.
    every_key, every_index = (gather_alike(x, group).transpose(0, 1).flatten(1) for x in (keys, indices))
    return Lists(*merge(every_key, every_index, k))


def merge_best(keys: Tensor, indices: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The best of the shards' best matches."""
    if group is None:
        return keys, indices
    best = merge_lists(Lists(keys[:, None], indices[:, None]), 1, group)
    return best.keys[:, 0], best.indices[:, 0]


def add_counts(counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the shards' counts."""
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts
