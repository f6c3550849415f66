"""What an operation to measure consists of: inputs, contenders, and the float64 truth they are held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.cells import DTYPES, PASSES, Cell, Shape

#: Relative Frobenius error against float64 that a result may always have.
FLOOR = {"fp32": 2e-6, "bf16": 6e-3, "fp16": 1e-3}
#: The same where float32 products may use TF32.
FLOOR_TF32 = 1e-3
#: Long sums round more: a result may err by as much again as torch's own formulation in the same dtype, …
YARDSTICK_FACTOR = 2.0
#: … whose own error must stay within this multiple of the floor.
YARDSTICK_LIMIT = 10.0
#: A relative error that no rounding explains: another formula.
HOPELESS = 0.5

#: normal(*size, scale=…, mean=…)
Normal = Callable[..., Tensor]


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
    the common one. `read` names the parts of what `forward` returns, where that is not one tensor, "out".
    """

    forward: Callable[[], Any]
    leaves: dict[str, Tensor]
    upstream: Tensor
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = field(default=lambda gradients: gradients)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    read: Callable[[Any], dict[str, Tensor]] = field(default=lambda out: {"out": out})

    def run_forward(self) -> Any:
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
            return self.read(self.run_forward())
        out, gradients = self.run_both()
        named = {f"d{name}": gradient for name, gradient in zip(self.leaves, gradients, strict=True)}
        return {**self.read(out.detach()), **self.rename(named)}


Build = Callable[[Inputs], Program]


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation. `mathematics` names its row of the cost table and its float64 truth.

    `stores`: it holds all of S where others need not.
    """

    name: str
    label: str
    build: Build
    mathematics: str
    ours: bool = False
    gpu_only: bool = False
    compiled: bool = False
    stores: bool = False


@dataclass(frozen=True)
class Probe:
    """A part of one result, and what it is in float64."""

    name: str
    pick: Callable[[Tensor], Tensor]
    truth: Tensor


@dataclass(frozen=True)
class Operation:
    """What is measured, and how it is shown.

    Attributes:
        name: As users call it.
        cells: (suite, "cpu" or "cuda") → what that suite measures of it there.
        make_inputs: Random tensors of a cell.
        contenders: The baseline, which times are relative to, comes first.
        probes: (inputs, mathematics, mode) → parts of the results, and what they are in float64.
        yardstick: The contender whose error the others' are measured by; it computes the operation in plain torch.
        modes: Its passes: a search has no backward pass.
        axes: What its lines run along, "MN" (M = N) or a size; the first is the memory's, too.
        sizes: Its sizes beyond M, N, D and B, with their defaults.
        bars: By dtype, what ours may err at most, where errors are part of what is compared: the others are then timed
            and shown with whatever error they have, up to `HOPELESS`.
        relative_to: The baseline in a word.
        unit: What it makes, in the plural …
        count: … and how many of them a call makes.
    """

    name: str
    cells: Mapping[tuple[str, str], list[Cell]]
    make_inputs: Callable[[Cell, torch.device, torch.Generator], Inputs]
    contenders: tuple[Contender, ...]
    probes: Callable[[Inputs, str, str], Iterator[Probe]]
    yardstick: str
    modes: tuple[str, ...] = PASSES
    axes: tuple[str, ...] = ("MN", "D", "B")
    sizes: Mapping[str, int] = field(default_factory=dict)
    bars: Mapping[str, float] | None = None
    relative_to: str = "cosine"
    unit: str = "similarities"
    count: Callable[[Shape], int] = lambda shape: shape.M * shape.N

    @property
    def baseline(self) -> str:
        return self.contenders[0].name

    @property
    def suites(self) -> tuple[str, ...]:
        """Those it is measured in."""
        return tuple(dict.fromkeys(suite for suite, _ in self.cells))

    def shape(self, given: Shape) -> Shape:
        """`given` with this operation's sizes in their order, those not given by default.

        Raises:
            ValueError: a size that it does not have.
        """
        if unknown := dict(given.extra).keys() - self.sizes.keys():
            raise ValueError(f"{self.name} has no {', '.join(sorted(unknown))}; {given}")
        return replace(given, extra=tuple({**self.sizes, **dict(given.extra)}.items()))


# ---------------------------------------------------------------------------------- what several operations need


def normal_for(cell: Cell, device: torch.device, generator: torch.Generator) -> Normal:
    """What draws this cell's tensors."""

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        drawn = torch.randn(size, generator=generator, device=device)
        return drawn.mul_(scale).add_(mean).to(DTYPES[cell.dtype])

    return normal


def metric_for(cell: Cell, normal: Normal) -> dict[str, Tensor]:
    """A metric around the identity."""
    s = cell.shape
    return {"W_diag": normal(s.D, scale=0.3, mean=1.0), "W_blocks": normal(s.D // s.B, s.B, s.B, scale=s.B**-0.5)}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile's form of a function, from a fresh start: past its limit of recompilations it runs eagerly."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def program_of(function: Callable[..., Any], *names: str, compile: bool = False) -> Build:
    """A program that calls a function on leaves of these names, in this order."""

    def build(inputs: Inputs) -> Program:
        leaves = inputs.leaves(*names)
        run = compiled(function) if compile else function
        return Program(lambda: run(*leaves.values()), leaves, inputs.upstream)

    return build


def installed(*contenders: tuple[str, Contender]) -> tuple[Contender, ...]:
    """The contenders whose library is installed."""
    return tuple(contender for library, contender in contenders if find_spec(library) is not None)


# -------------------------------------------------------------------------------------------------------- errors


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
    """The largest relative difference of two contenders' whole results; integers, such as indices, are probed alone."""
    shared = [name for name, value in agreed.items() if value.is_floating_point()]
    return max((relative_error(found[name].float(), agreed[name].float()) for name in shared), default=0.0)


def error_floor(dtype: str) -> float:
    """The error that is always allowed, under the float32 precision now set."""
    tf32 = dtype == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return FLOOR_TF32 if tf32 else FLOOR[dtype]
