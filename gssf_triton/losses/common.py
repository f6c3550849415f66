"""What the losses share: checks, folding, the operands of the product, the autograd function and the reduction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.losses.processes import Parts, gather_rows, spread
from gssf_triton.metric import IDENTITY, Metric
from gssf_triton.once import Once
from gssf_triton.precision import joined, product_dtype
from gssf_triton.processes import kind
from gssf_triton.similarity.functional import fold_rows
from gssf_triton.streaming.driver import Result, stream

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Features:
    """Features and weights that passed every check; nothing has run yet, and nothing is rounded."""

    a: Tensor
    b: Tensor
    metric: Metric
    normalize: bool
    backend: str

    @property
    def are_half(self) -> bool:
        """Whether the product may be in half precision."""
        return product_dtype(self.a).itemsize == 2

    def folded(self) -> tuple[Tensor, Tensor]:
        """T(a) and b, normalised where asked for, in float32 at least: rounding is left to the product's operands."""
        t = fold_rows(self.a, self.metric, self.normalize, backend=self.backend)
        return t, fold_rows(self.b, IDENTITY, self.normalize, backend=self.backend)

    def described(self) -> dict[str, object]:
        return {
            "D": self.a.shape[1], "dtype": self.a.dtype, "W_diag": kind(self.metric.W_diag),
            "W_blocks": kind(self.metric.W_blocks), "normalize": self.normalize, "backend": self.backend,
        }  # fmt: skip


def check_features(
    a: object, b: object, metric: Metric, normalize: bool, backend: str, *, paired: bool = True, prefix: str = ""
) -> Features:
    """Check the features and the weights: `paired` wants as many rows on both sides.

    `prefix` is what the arguments' names begin with. A teacher ("teacher_") may have no weight: plain dot products.
    """
    names = f"{prefix}a", f"{prefix}b"
    checks.check_flags(normalize=normalize)
    checks.check_batches(a, b, names, paired=paired)
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    if not (prefix and metric.is_identity):
        checks.check_weights(names[0], a, metric.W_diag, metric.W_blocks, prefix=prefix)
    a, b = joined(a, b)
    checks.check_same_dtype(a, b, names)
    return Features(a, b, metric, normalize, resolve_backend(backend, a, metric.W_blocks))


def check_reduction(reduction: str, group: object) -> None:
    """What all losses take besides their inputs."""
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_group(group)


class Product(NamedTuple):
    """The operands of S, and of the teacher's similarities: tensors alone, as autograd takes them.

    The rows of S are t · unit_t and y · unit_y, each unit a power of two, () float32 or float64. A teacher's units are
    one, `teacher_unit`. A loss gives the operands no gradient; they are what makes its gradient depend on t and y.
    """

    t: Tensor
    y: Tensor
    unit_t: Tensor
    unit_y: Tensor
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    teacher_t: Tensor | None = None
    teacher_y: Tensor | None = None
    teacher_unit: Tensor | None = None


def largest_finite(x: Tensor) -> Tensor:
    """The largest |x| but for NaN and Inf, which stay in their rows: they must not scale the others. 0 of nothing."""
    size = x.abs()
    return torch.where(torch.isfinite(size), size, 0.0).amax() if x.numel() else x.new_zeros(())


def operand(x: Tensor, half: bool, backend: str) -> tuple[Tensor, Tensor]:
    """x (M, D) and its unit: x itself, or for half-precision features on Triton float16 of a common power of two.

    Not bfloat16: its 8 bits, times a logit scale of 100, would put errors of a percent into the gradients. float16
    has 11 bits at the same speed, and the power of two keeps its range out of the way, exactly.
    """
    one = torch.ones((), dtype=x.dtype, device=x.device)
    if not half or backend == "torch":
        return x, one
    largest = largest_finite(x.detach())
    mantissa, _ = torch.frexp(largest)
    unit = torch.where(largest > 0, largest / mantissa, one)
    return (x / unit).to(torch.float16), unit


@dataclass(frozen=True)
class Loss(Once):
    """A loss of t (M, D), y (N, D) and scalars; a subclass says what its values and their slopes are.

    Attributes:
        summed: One loss, (), in place of one a row.
        at_once: The slopes of a summed loss are made by the forward pass, up to a factor.
        parts: The processes' parts of the batch.
        backend: "triton" or "torch".
    """

    GRADIENTS = 2

    summed: bool
    at_once: bool
    parts: Parts
    backend: str

    @abstractmethod
    def values(self, x: Product, *scalars: Any) -> tuple[Tensor, ...]:
        """One loss a row, further results, then what is kept for `slopes`: none of them an input."""

    def slopes(self, x: Product, weight: Tensor, *kept: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(slope @ y, slopeᵀ @ t, totals) of Σ weight · value, weight (M,); `kept` begins with the scalars.

        The totals are the scalars' gradients, of the operands' product in place of S.
        """
        raise AssertionError(f"{self.NAME} has a backward pass of its own")

    def stream(
        self, epilogue: str, x: Product, scalars: Tensor, rows: Tensor | None = None, columns: Tensor | None = None,
        *, wants_slope: bool = False,
    ) -> Result:  # fmt: skip
        """What the epilogue keeps of S."""
        operands = Operands(
            x.t, x.y, scalars, rows, columns, x.row_ids, x.column_ids, x.teacher_t, x.teacher_y, self.parts.own.start
        )
        return stream(epilogue, operands, wants_slope=wants_slope, backend=self.backend)

    def links(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Inputs besides the operands."""
        return ()

    def unpacked(self, inputs: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Product, tuple[Tensor, ...]]:
        """Scalars, operands, and what follows them."""
        first = self.GRADIENTS - 2
        end = first + len(Product._fields)
        return inputs[:first], Product(*inputs[first:end]), inputs[end:]

    def forward(self, t: Tensor, y: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        scalars, x, _ = self.unpacked(inputs)
        loss, *further = self.values(x, *scalars)
        return self.parts.sum(loss.sum()) if self.summed else loss, *further

    def saved(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The scalars and the operands, which take the place of t and y."""
        return inputs[2:]

    def backward(self, grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        scalars, x, kept = self.unpacked(saved)
        factor, weight = self.incoming(grad, x.unit_t)
        d_t, d_y, totals = self.slopes(x, weight.expand(x.t.shape[0]), *scalars, *kept)
        scaled = factor * scalars[0] if scalars else factor
        # What the forward pass made is kept for another backward pass.
        times = torch.mul if self.at_once else Tensor.mul_
        d_scale = [totals[0] * x.unit_t * x.unit_y * factor] if scalars else []
        d_others = [total * factor for total in totals[1:]]
        return times(d_t, scaled * x.unit_y), times(d_y, scaled * x.unit_t), *d_scale, *d_others

    def incoming(self, grad: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """A loss's incoming gradient, () or (M,), as (common factor, weights of length M or 1).

        The slopes are made for weights in [−1, 1], so that float16 holds them, in units that all processes share. One
        that is not finite stays so, and in its row. The factor is of the sum of all processes' losses: a scalar is the
        same loss on each of them, so it counts that often.
        """
        grad = grad.to(like.dtype)
        if self.summed:
            return grad * self.parts.count, torch.ones_like(grad)[None]
        largest = self.parts.max(largest_finite(grad))
        factor = torch.where(largest > 0, largest, torch.ones_like(largest))
        return factor, grad / factor


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor of like's dtype and device; differentiable."""
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device, like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def wants_gradient(*tensors: Tensor) -> bool:
    """True where a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@dataclass(frozen=True)
class Batch:
    """What a loss is called with, besides its own options.

    Attributes:
        student: The features, and the metric that learns.
        reduction: "mean", "sum" or "none".
        group: The processes that hold the batch, or None.
        ids: (M,) integers, or None.
        scalars: By name, the scale first.
        teacher: Features of the teacher, or None; without one b[i] matches a[i].
    """

    student: Features
    reduction: str
    group: dist.ProcessGroup | None
    ids: Tensor | None
    scalars: Mapping[str, Tensor | float]
    teacher: Features | None = None

    def __post_init__(self) -> None:
        check_reduction(self.reduction, self.group)
        a = self.student.a
        if self.ids is not None:
            checks.check_labels("ids", self.ids, a.shape[0], "a", a)
        for name, value in self.scalars.items():
            checks.check_scalar(name, value, "a", a)

    def run(self, loss: type[Loss], *, at_once: bool = False, **options: Any) -> tuple[Tensor, ...]:
        """The loss reduced, and its further results. `options` are its fields, and what all processes must agree on.

        `at_once`: its slopes need no second pass, see `Loss.at_once`.
        """
        a, backend = self.student.a, self.student.backend
        t, y = self.student.folded()
        scalars = [scalar(value, t) for value in self.scalars.values()]
        lengths = (a.shape[0],) if self.teacher is None else (a.shape[0], self.student.b.shape[0])
        call = self._described(loss.NAME, (t, y), scalars, options) if self.group is not None else {}
        parts, *others = spread(self.group, lengths, a.device, call)
        columns = others[0] if others else parts
        summed, y = self.reduction != "none", gather_rows(y, columns)
        op = loss(summed, at_once and summed and wants_gradient(t, y, *scalars), parts, backend, **options)
        inputs = [*scalars, *self._product(t, y, parts, columns)]
        values, *further = op(t, y, *inputs, *op.links(t, y))
        # The mean of nothing is 0.
        return values / max(parts.pairs, 1) if self.reduction == "mean" else values, *further

    def _product(self, t: Tensor, y: Tensor, parts: Parts, columns: Parts) -> Product:
        half, backend = self.student.are_half, self.student.backend
        (rows, unit_t), (column_rows, unit_y) = operand(t, half, backend), operand(y, half, backend)
        ids = None if self.ids is None else self.ids.to(torch.int64)
        x = rows, column_rows, unit_t, unit_y, ids, None if ids is None else parts.gather(ids)
        if self.teacher is None:
            return Product(*x)
        with torch.no_grad():
            teacher_t, teacher_y = self.teacher.folded()
        half = self.teacher.are_half
        rows, unit_t = operand(teacher_t.to(t.dtype), half, backend)
        column_rows, unit_y = operand(columns.gather(teacher_y).to(t.dtype), half, backend)
        return Product(*x, rows, column_rows, (unit_t * unit_y).to(t.dtype))

    def _described(
        self, name: str, sides: tuple[Tensor, Tensor], scalars: list[Tensor], options: Mapping[str, Any]
    ) -> dict[str, object]:
        """What every process must do alike: one that takes no part in a collective leaves the others waiting."""
        gradients, of_scalars = (tuple(map(wants_gradient, tensors)) for tensors in (sides, scalars))
        matched = {"ids": self.ids is not None} if self.teacher is None else {"teacher": self.teacher.described()}
        return {
            "loss": name, **self.student.described(), "half": self.student.are_half, "gradients": gradients,
            "of scalars": of_scalars, **self.scalars, **matched, **options, "reduction": self.reduction,
        }  # fmt: skip
