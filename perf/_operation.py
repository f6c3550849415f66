"""What an operation to measure consists of: inputs, contenders, and the float64 truth they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from _cells import Cell
from torch import Tensor

#: Relative Frobenius error against float64 that a result may always have.
FLOOR = {"fp32": 2e-6, "bf16": 6e-3, "fp16": 1e-3}
#: The same where float32 products may use TF32.
FLOOR_TF32 = 1e-3
#: Long sums round more: a result may err by as much again as torch's own formulation in the same dtype, …
YARDSTICK_FACTOR = 2.0
#: … whose own error must stay within this multiple of the floor.
YARDSTICK_LIMIT = 10.0


@dataclass(frozen=True)
class Inputs:
    """Tensors by name, all random; `upstream` is the gradient that the backward pass starts from."""

    tensors: dict[str, Tensor]
    upstream: Tensor

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Fresh leaves that share the inputs' memory."""
        return {name: self.tensors[name].detach().requires_grad_() for name in names}


@dataclass
class Program:
    """A contender set up on one cell's inputs.

    `leaves` are the tensors gradients are asked for; `rename` brings this contender's own layout of the gradients to
    the common one.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    upstream: Tensor
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda gradients: gradients)
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def run_forward(self) -> Tensor:
        with torch.no_grad(), self.around():
            return self.forward()

    def run_both(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        with self.around():
            out = self.forward()
            return out, torch.autograd.grad(out, tuple(self.leaves.values()), self.upstream)

    def call(self, mode: str) -> Callable[[], object]:
        """What is timed."""
        return self.run_forward if mode == "forward" else self.run_both

    def results(self, mode: str) -> dict[str, Tensor]:
        """What is checked, under the common names."""
        if mode == "forward":
            return {"out": self.run_forward()}
        out, gradients = self.run_both()
        named = {f"d{name}": gradient for name, gradient in zip(self.leaves, gradients, strict=True)}
        return {"out": out.detach(), **self.rename(named)}


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation. `mathematics` names its row of the cost table and its float64 truth."""

    name: str
    label: str
    build: Callable[[Inputs], Program]
    mathematics: str
    ours: bool = False
    gpu_only: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Probe:
    """A part of one result, and what it is in float64."""

    name: str
    pick: Callable[[Tensor], Tensor]
    truth: Tensor


@dataclass(frozen=True)
class Operation:
    """`suites`: those it is measured in.

    `contenders`: the baseline, which times are relative to, comes first. `yardstick` names the contender whose error
    the others' are measured by; it computes the operation in plain torch.
    """

    name: str
    suites: tuple[str, ...]
    make_inputs: Callable[[Cell, torch.device, torch.Generator], Inputs]
    contenders: tuple[Contender, ...]
    probes: Callable[[Inputs, str, str], Iterator[Probe]]
    yardstick: str

    @property
    def baseline(self) -> str:
        return self.contenders[0].name


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖; infinite where a NaN or an Inf came, or another shape."""
    if value.shape != truth.shape:
        return float("inf")
    error = (value.to(truth.dtype) - truth).norm() / truth.norm().clamp_min(1e-30)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


def largest_error(found: dict[str, Tensor], probes: list[Probe]) -> float:
    """The largest of the probes' relative errors against float64."""
    return max(relative_error(probe.pick(found[probe.name]), probe.truth) for probe in probes)


def disagreement(found: dict[str, Tensor], agreed: dict[str, Tensor]) -> float:
    """The largest relative difference of two contenders' whole results."""
    return max(relative_error(found[name].float(), agreed[name].float()) for name in agreed)


def error_floor(dtype: str) -> float:
    """The error that is always allowed, under the float32 precision now set."""
    tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return FLOOR_TF32 if tf32 else FLOOR[dtype]
