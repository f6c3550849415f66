"""What a call does that a CUDA graph cannot capture: prints JSON, call → [fault, …].

On the stub of a GPU, whose tensors hold no data: reading one fails there, as it does during a capture. Each call is
made twice, and the second counts: a capture comes after a warm-up.

A program of its own, since launches are recorded only without Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import gssf_triton as gssf
from gssf_triton.autotune import rehearsal
from gssf_triton.autotune.rehearsal import Tape
from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
D, B = 64, 32
#: Pairs: a step worth capturing, and one whose similarities are not stored.
SIZES = (256, 8192)
Calls = dict[str, Callable[[], object]]


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def fault(name: str, arguments: Any, out: Any) -> str | None:
    """A copy from the host's memory, or an index whose result has a length that the data decide."""
    given = tensors(arguments)
    host = [x for x in (*given, *tensors(out)) if x.device.type == "cpu"]
    everywhere = len(host) == len(given) + len(tensors(out))
    # A number on the CPU is an argument of the kernel.
    if host and not everywhere and (name in ("_to_copy", "copy_") or any(x.dim() for x in host)):
        return f"{name} between host and device"
    if name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
        x.dtype in (torch.bool, torch.uint8) for x in given[1:]
    ):
        return f"{name} by a mask"
    return None


class Watch(Tape):
    """A tape that collects the faults as well."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.faults: list[str] = []

    def operation(self, func: Any, arguments: Any, out: Any) -> None:
        super().operation(func, arguments, out)
        if found := fault(func._schema.name.split("::")[1], arguments, out):
            self.faults.append(found)

    def noted(self, name: str, function: Any, always: bool) -> Any:
        """The function, a fault wherever it is called, or where it is called for the device."""

        def note(*args: Any, **kwargs: Any) -> Any:
            if always or torch.device(kwargs.get("device") or "cpu").type == "cuda":
                self.faults.append(name)
                kwargs.pop("device", None)
            return function(*args, **kwargs)

        return note

    def run(self, call: Callable[[], object]) -> tuple[list[str], set[tuple[str, str]]]:
        """The faults of a call, and the keys of what it launches."""
        self.faults = []
        self.cut()
        with ExitStack() as stack:
            for owner, name, always in (
                *((torch.cuda, name, True) for name in ("synchronize", "Event", "Stream", "empty_cache")),
                (torch.Tensor, "new_tensor", True), (torch, "tensor", False), (torch, "as_tensor", False),
            ):  # fmt: skip
                noted = self.noted(name, getattr(owner, name), always)
                stack.enter_context(mock.patch.object(owner, name, noted))
            self.faults += errors_of(call)
        return self.faults, self.cut().keys


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, device="cuda", dtype=dtype, requires_grad=True)


def modules() -> dict[str, torch.nn.Module]:
    metric = GSSF(D, B, device="cuda")
    losses: dict[str, torch.nn.Module] = {
        "InfoNCELoss": InfoNCELoss(metric),
        "InfoNCELoss, smoothed": InfoNCELoss(metric, label_smoothing=0.1, symmetric=False),
        "SigmoidLoss": SigmoidLoss(metric),
        "TripletLoss": TripletLoss(metric),
        "TripletLoss, all": TripletLoss(metric, hardest=False),
        "DistillationLoss": DistillationLoss(metric),
        "GSSF": metric,
    }
    for loss in losses.values():
        for name in ("log_logit_scale", "logit_bias"):
            if hasattr(loss, name):
                setattr(loss, name, torch.nn.Parameter(torch.empty(1, device="cuda")))
    return losses


def calls() -> Calls:
    """Forward and backward of each public function but for the search, which returns to the host for its results."""
    items, words = rows(16, 36, D), rows(24, 32, D)
    mask = torch.empty(16, 36, device="cuda", dtype=torch.bool)
    learned = modules()
    weights = {"W_diag": learned["GSSF"].W_diag, "W_blocks": learned["GSSF"].W_blocks}
    found: Calls = {
        "late_interaction": lambda: gssf.late_interaction(items, words, **weights, region_mask=mask),
        "cross_attention_sim": lambda: gssf.cross_attention_sim(items, words, **weights, region_mask=mask),
        "attention": lambda: gssf.attention(items, words[:16], words[:16], **weights),
    }
    for pairs in SIZES:
        a, b, ids = rows(pairs, D), rows(pairs, D), torch.empty(pairs, device="cuda", dtype=torch.int64)
        of_two: dict[str, Callable[..., Any]] = {
            "pairwise_sim": partial(gssf.pairwise_sim, **weights, normalize=True),
            "pairwise_terms": lambda a, b: torch.stack(gssf.pairwise_terms(a, b, **weights)),
            "paired_sim": partial(gssf.paired_sim, **weights),
            "transform": lambda a, b: gssf.transform(a, **weights),
            **learned,
        }
        for name, function in of_two.items():
            more = (b.detach(), a.detach()) if name == "DistillationLoss" else ()
            found[f"{name}, {pairs} pairs"] = partial(function, a, b, *more)
            if name in ("InfoNCELoss", "SigmoidLoss", "TripletLoss", "TripletLoss, all"):
                found[f"{name}, {pairs} pairs with ids"] = partial(function, a, b, ids)
    return {name: lambda call=call: call().sum().backward() for name, call in found.items()}  # type: ignore[misc]


def planted() -> Calls:
    """What must be found, in the middle of a call."""

    def inside(plant: Callable[[Tensor], object]) -> Callable[[], object]:
        metric, a = GSSF(D, B, device="cuda"), rows(SIZES[0], D)

        def hook(_: torch.nn.Module, sides: tuple[Tensor, ...]) -> None:
            plant(sides[0])

        metric.register_forward_pre_hook(hook)
        return lambda: metric(a, a).sum().backward()

    return {
        "item": inside(lambda x: x.sum().item()),
        "bool": inside(lambda x: bool(x.isnan().any())),
        "mask": inside(lambda x: x[x > 0]),
        "put": inside(lambda x: x.clone().index_put_((x.detach() > 0,), x.new_zeros(x.numel()))),
        "nonzero": inside(lambda x: x.nonzero()),
        "equal": inside(lambda x: torch.equal(x, x)),
        "unique": inside(lambda x: x.unique()),
        "to host": inside(lambda x: x.cpu()),
        "to device": inside(lambda x: torch.ones(3).to(x.device)),
        "number to device": inside(lambda x: torch.ones(()).to(x.device)),
        "copy_": inside(lambda x: x.clone().copy_(torch.ones(D))),
        "tensor": inside(lambda x: torch.tensor(1.0, device=x.device)),
        "new_tensor": inside(lambda x: x.new_tensor([1.0])),
        "synchronize": inside(lambda x: torch.cuda.synchronize()),
        "event": inside(lambda x: torch.cuda.Event()),
    }


def harmless() -> Calls:
    """What a capture allows."""
    x = rows(SIZES[0], D)
    return {
        "full": lambda: torch.full((), 2.0, device="cuda") * x,
        "a number on the CPU": lambda: x * torch.tensor(2.0),
        "on the CPU alone": lambda: torch.ones(3).to(torch.float64).sum().item(),
        "index": lambda: x[torch.empty(5, device="cuda", dtype=torch.int64)],
        "where": lambda: torch.where(x > 0, x, 0.0),
    }


def faults_of(watch: Watch, call: Callable[[], object]) -> list[str]:
    _, compiled = watch.run(call)
    found, launched = watch.run(call)
    return found + [f"compiles {name}" for name, _ in launched - compiled]


def page() -> Calls:
    """The examples of docs/training.md: they may wait, and nothing else may fail."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    return {block.strip().splitlines()[-1]: partial(exec, block, names) for block in blocks}


def errors_of(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def main() -> dict[str, dict[str, list[str]]]:
    groups = {"calls": calls, "planted": planted, "harmless": harmless}
    with mock.patch.object(rehearsal, "Tape", Watch), rehearsal.recording("sm_90") as watch:
        assert isinstance(watch, Watch)
        found = {
            group: {name: faults_of(watch, call) for name, call in make().items()} for group, make in groups.items()
        }
        with mock.patch.object(torch, "compile", lambda module, mode: module):
            found["page"] = {name: errors_of(call) for name, call in page().items()}
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout, ensure_ascii=False)
