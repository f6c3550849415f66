"""A gallery sharded over processes: gloo processes on the CPU get, each of them, what one process gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.gloo import in_processes
from support.retrieval_reference import coarse, coarse_weights

import gssf_triton
from gssf_triton.backend import interpreter_is_on

WORLD = 3
#: gloo's processes are on the CPU, where the kernels run only in the interpreter.
BACKENDS = ["torch", "triton"] if interpreter_is_on() else ["torch"]
#: Items of each shard: unequal, one of them empty, one smaller than k.
SHARDS = {"unequal": (40, 5, 66), "empty": (0, 70, 3), "one-each": (1, 1, 1)}


def problem(sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The whole call; every process makes the same one."""
    torch.manual_seed(seed)
    Q, N = 14, sum(sizes)
    call = {"queries": coarse(Q, 12), "gallery": coarse(N, 12), **coarse_weights("diag+blocks", 3, 4)}
    call["gallery"][torch.rand(N) < 0.05] = float("nan")
    return {
        "call": call,
        "exclude": torch.randint(-1, N, (Q,)),
        "mask": torch.rand(Q, N) < 0.6,
        "labels": {
            "query_ids": torch.randint(0, 9, (Q,)),
            "gallery_ids": torch.randint(0, 7, (N,)),
            "query_cams": torch.randint(0, 2, (Q,)),
            "gallery_cams": torch.randint(0, 2, (N,)),
        },
    }


def _compare(rank: int, sizes: tuple[int, ...], seed: int, backend: str) -> None:
    whole = problem(sizes, seed)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    group = dist.group.WORLD
    call, labels, mask, exclude = whole["call"], whole["labels"], whole["mask"], whole["exclude"]
    shard = call | {"gallery": call["gallery"][part]}
    N = sum(sizes)
    for k in sorted({1, min(7, N), N}):
        for options, cut in (({}, {}), ({"exclude": exclude, "mask": mask}, {"mask": mask[:, part]})):
            expected = gssf_triton.topk(**call, **options, k=k)
            ours = gssf_triton.topk(**shard, **options | cut, k=k, group=group, backend=backend)
            assert ours[1].equal(expected[1])
            torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0, equal_nan=True)
    local = labels | {name: labels[name][part] for name in ("gallery_ids", "gallery_cams")}
    expected_ranks = gssf_triton.ranks(**call, **labels, exclude=exclude, mask=mask)
    ours_ranks = gssf_triton.ranks(**shard, **local, exclude=exclude, mask=mask[:, part], group=group, backend=backend)
    assert ours_ranks.equal(expected_ranks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SHARDS.values(), ids=SHARDS)
def test_every_process_gets_the_whole_answer(sizes: tuple[int, ...], backend: str) -> None:
    in_processes(WORLD, _compare, sizes, int(torch.randint(2**31, ())), backend)


def _disagree(rank: int) -> None:
    queries, gallery, W_diag = torch.ones(4 + (rank == 2), 8), torch.ones(5, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"every process .* rank 2: call = topk, queries = \(5, 8\)"):
        gssf_triton.topk(queries, gallery, W_diag, k=3, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="k must lie between 0 and the gallery's 15 items, got 16"):
        gssf_triton.topk(torch.ones(4, 8), gallery, W_diag, k=16, group=dist.group.WORLD)
    _, indices = gssf_triton.topk(torch.ones(4, 8), gallery, W_diag, k=15, group=dist.group.WORLD)
    assert indices.equal(torch.arange(15).expand(4, 15))


def test_processes_that_disagree_are_told_so() -> None:
    """On every one of them: none is left waiting for the others."""
    in_processes(WORLD, _disagree)


def _in_a_subgroup(rank: int) -> None:
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    gallery = torch.arange(1.0, 5.0)[:, None] * (1 + rank)  # 1 2 3 4 and 3 6 9 12
    values, indices = gssf_triton.topk(torch.ones(1, 1), gallery, torch.ones(1), k=4, group=group)
    assert values.tolist() == [[12, 9, 6, 4]] and indices.tolist() == [[7, 6, 5, 3]]


def test_a_group_of_some_processes() -> None:
    in_processes(WORLD, _in_a_subgroup)
