"""A gallery cut into shards, one a process: each process ranks its own, and the answers are merged exactly.

Every process of the group calls with the same queries and its own shard, and gets the whole answer. Indices count
through the shards in order of rank. What travels is Q·k keys and indices, or Q of them, never a score matrix.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton.retrieval.order import absent, merge
from gssf_triton.retrieval.scan import Lists


def _gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def place(queries: Tensor, items: int, k: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(index of this shard's first item, items in all shards).

    Raises:
        ValueError: on every process alike, where their queries' shapes or k differ.
    """
    if group is None:
        return 0, items
    mine = torch.tensor([queries.shape[0], queries.shape[1], k, items], device=queries.device)
    calls = [tuple(call) for call in torch.stack(_gather(mine, group)).tolist()]
    if len({call[:3] for call in calls}) > 1:
        said = "; ".join(f"rank {rank}: queries ({Q}, {D}), k = {k}" for rank, (Q, D, k, _) in enumerate(calls))
        raise ValueError(f"queries and k must be the same on every process of the group, got {said}")
    sizes = [call[3] for call in calls]
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
    return Lists(*merge(torch.cat(_gather(keys, group), dim=1), torch.cat(_gather(indices, group), dim=1), k))


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
