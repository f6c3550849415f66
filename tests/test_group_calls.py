"""Calls of a group that differ end in one error on every process, before any features travel.

gloo processes on the CPU. A collective of two shapes or dtypes ends a gloo process with SIGABRT, or mixes the two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.gloo import in_processes

import gssf_triton
from gssf_triton import processes
from gssf_triton.processes import agree

#: What rank 1 changes of the call that rank 0 makes, by what is wrong with it.
Change = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]


def loss(**more: Any) -> dict[str, Any]:
    return {"a": torch.randn(4, 8), "b": torch.randn(4, 8), "W_diag": torch.ones(8), "W_blocks": None} | more


def info(**more: Any) -> dict[str, Any]:
    return loss(logit_scale=1.0) | more


def sigmoid(**more: Any) -> dict[str, Any]:
    return loss(logit_scale=1.0, logit_bias=0.0) | more


def teachers(**more: Any) -> dict[str, Any]:
    return loss(teacher_a=torch.randn(4, 6), teacher_b=torch.randn(4, 6), logit_scale=1.0) | more


def search(**more: Any) -> dict[str, Any]:
    given = {"queries": torch.randn(4, 8), "gallery": torch.randn(5, 8), "W_diag": torch.ones(8), "W_blocks": None}
    return given | more


def cast(dtype: torch.dtype, *names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Tensors of these names in another dtype."""
    return lambda call: call | {name: call[name].to(dtype) for name in names if call.get(name) is not None}


FEATURES = ("a", "b", "queries", "gallery", "W_diag", "W_blocks")
wide, half, brain = (cast(dtype, *FEATURES) for dtype in (torch.float64, torch.float16, torch.bfloat16))
wide_teacher = cast(torch.float64, "teacher_a", "teacher_b")
ONE = torch.ones(())
BLOCKS = torch.zeros(2, 4, 4)
IDS = {"query_ids": torch.arange(4), "gallery_ids": torch.arange(5)}
CAMS = {"query_cams": torch.arange(4), "gallery_cams": torch.arange(5)}

#: (function, its call, what the other process changes), with what the error must name.
DIFFERENT: dict[str, tuple[str, dict[str, Any], Change]] = {
    "normalize = True": ("info_nce", info(), {"normalize": True}),
    "W_diag = None": ("triplet_loss", loss(W_blocks=BLOCKS), {"W_diag": None}),
    "W_blocks = (torch.float32, 4, 2, 2)": ("triplet_loss", loss(W_blocks=BLOCKS), {"W_blocks": torch.zeros(4, 2, 2)}),
    "W_diag = (torch.float16, 8)": ("triplet_loss", loss(), {"W_diag": torch.ones(8).half()}),
    "dtype = torch.float64": ("sigmoid_loss", sigmoid(), wide),
    "dtype = torch.bfloat16": ("triplet_loss", loss(), brain),
    "logit_scale = 2": ("info_nce", info(), {"logit_scale": 2.0}),
    "logit_bias = -1.5": ("sigmoid_loss", sigmoid(), {"logit_bias": -1.5}),
    "of scalars = (True,)": ("info_nce", info(logit_scale=ONE), {"logit_scale": ONE.clone().requires_grad_()}),
    "margin = 0.3": ("triplet_loss", loss(), {"margin": 0.3}),
    "hardest = False": ("triplet_loss", loss(), {"hardest": False}),
    "reduction = none": ("triplet_loss", loss(), {"reduction": "none"}),
    "symmetric = False": ("info_nce", info(), {"symmetric": False}),
    "label_smoothing = 0.1": ("info_nce", info(), {"label_smoothing": 0.1}),
    "'dtype': torch.float64": ("distillation_loss", teachers(), wide_teacher),
    "'D': 7": ("distillation_loss", teachers(), {"teacher_a": torch.ones(4, 7), "teacher_b": torch.ones(4, 7)}),
    "'W_diag': (torch.float32, 6)": ("distillation_loss", teachers(), {"teacher_W_diag": torch.ones(6)}),
    "loss = distillation_loss": ("info_nce", info(), lambda x: {"": "distillation_loss"} | teachers()),
    "call = topk": ("info_nce", info(), lambda x: {"": "topk"} | search(k=2)),
    "call = ranks": ("topk", search(k=2), lambda x: {"": "ranks"} | search(**IDS)),
    "k = 3": ("topk", search(k=2), {"k": 3}),
    "queries = (3, 8)": ("topk", search(k=2), {"queries": torch.ones(3, 8)}),
    "call = topk, normalize = True": ("topk", search(k=2), {"normalize": True}),
    "call = topk, dtype = torch.float64": ("topk", search(k=2), wide),
    "call = topk, dtype = torch.float16": ("topk", search(k=2), half),
    "call = ranks, dtype = torch.float64": ("ranks", search(**IDS), wide),
    "mask = True": ("topk", search(k=2), {"mask": torch.ones(4, 5, dtype=torch.bool)}),
    "exclude = True": ("ranks", search(**IDS), {"exclude": torch.arange(4)}),
    "query_cams = True": ("ranks", search(**IDS), CAMS),
    "call = topk, W_diag = None": ("topk", search(k=2, W_blocks=BLOCKS), {"W_diag": None}),
}  # fmt: skip


def _differ(rank: int) -> None:
    group = dist.group.WORLD
    for wanted, (function, call, change) in DIFFERENT.items():
        theirs = change(call) if callable(change) else call | change
        name = theirs.pop("", function)
        ours, called = (name, theirs) if rank else (function, call)
        with pytest.raises(ValueError, match="every process of the group must make the same call") as error:
            getattr(gssf_triton, ours)(**called, group=group)
        said = [None, None]
        dist.all_gather_object(said, str(error.value), group=group)
        assert said[0] == said[1], (wanted, said)
        assert wanted in str(error.value).partition("; rank 1: ")[2], (wanted, said)
    # Nobody was left behind, and what is the same number is the same call.
    assert gssf_triton.triplet_loss(**loss(), margin=float(1) if rank else 1, group=group).isfinite()


def _differ_under_autocast(rank: int) -> None:
    x, weight = torch.randn(4, 8), torch.ones(8)
    with (
        torch.autocast("cpu", enabled=rank == 1),
        pytest.raises(ValueError, match=r"rank 0: loss = triplet_loss.*; rank 1: loss = triplet_loss, "),
    ):
        gssf_triton.triplet_loss(x, x, weight, group=dist.group.WORLD)


def _long(rank: int) -> None:
    """A difference far behind what any fixed number of bytes would hold, and calls without one."""
    group, device = dist.group.WORLD, torch.device("cpu")
    same = {f"argument_{i}": "value" for i in range(300)}
    with mock.patch.object(processes, "gather_alike", wraps=processes.gather_alike) as gather:
        assert agree(group, (3 + rank, 7), device, same) == [[3, 7], [4, 7]]
    gather.assert_called_once()
    with pytest.raises(
        ValueError, match=r"rank 0: argument_0 = value, last = 0; rank 1: argument_0 = value, last = 1$"
    ):
        agree(group, (3, 7), device, same | {"last": rank})
    with pytest.raises(ValueError, match=r"rank 0: argument_0 = value, sizes = 1; rank 1: .*sizes = 2"):
        agree(group, (3,) * (1 + rank), device, same)


def _all_of_it(rank: int) -> None:
    _differ(rank)
    _differ_under_autocast(rank)
    _long(rank)


def test_calls_that_differ_end_in_the_same_error_on_every_process() -> None:
    in_processes(2, _all_of_it)


def _without_a_warning(rank: int) -> None:
    group, weight = dist.group.WORLD, torch.ones(8)
    a, b = (torch.randn(3 + rank, 8, requires_grad=True) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = (
            gssf_triton.info_nce(a, b, weight, logit_scale=1.0, group=group),
            gssf_triton.sigmoid_loss(a, b, weight, logit_scale=1.0, logit_bias=0.0, group=group),
            gssf_triton.triplet_loss(a, b, weight, group=group),
            gssf_triton.triplet_loss(a, b, weight, hardest=False, group=group),
            gssf_triton.distillation_loss(a, b, weight, teacher_a=a, teacher_b=b, logit_scale=1.0, group=group),
        )
        sum(losses).backward()
        gssf_triton.topk(torch.ones(2, 8), b, weight, k=2, group=group)
        ids = {"query_ids": torch.arange(2), "gallery_ids": torch.arange(len(b))}
        gssf_triton.ranks(torch.ones(2, 8), b, weight, **ids, group=group)


def test_no_collective_is_a_deprecated_one() -> None:
    in_processes(2, _without_a_warning)
