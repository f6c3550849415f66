"""What the losses share: folding, the operands of the product, the autograd function and the reduction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gssf_triton.kernels.stream_values import Operands
from gssf_triton.losses.processes import Parts
from gssf_triton.losses.sides import Form, finish, prepare, unit_of
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype
from gssf_triton.once import Once
from gssf_triton.precision import full_precision
from gssf_triton.similarity.bilinear import cast_like
from gssf_triton.similarity.sides import Side
from gssf_triton.streaming.driver import Result, stream


class Product(NamedTuple):
    """The operands of S, and of the teacher's similarities.

    S is t yᵀ times `unit`, a power of two, (); None for 1. The teacher's similarities have a unit of their own.
    """

    t: Tensor
    y: Tensor
    unit: Tensor | None = None
    row_ids: Tensor | None = None
    column_ids: Tensor | None = None
    teacher_t: Tensor | None = None
    teacher_y: Tensor | None = None
    teacher_unit: Tensor | None = None

    def scaled(self, scale: Tensor) -> Tensor:
        """What multiplies t yᵀ where `scale` multiplies S."""
        return scale if self.unit is None else scale * self.unit

    def scaled_teacher(self, scale: Tensor) -> Tensor:
        """The same of the teacher's product."""
        return scale if self.teacher_unit is None else scale * self.teacher_unit


class Whole(NamedTuple):
    """What a loss makes of all of S at once.

    Attributes:
        rows: One loss a row, (M,).
        further: Further results.
        slope: ∂Σ rows/∂(scale·S) / `weight`, (M, N), or None.
        totals: The scalars' gradients / `weight`, Σ slope · S the first.
    """

    rows: Tensor
    further: tuple[Tensor, ...] = ()
    slope: Tensor | None = None
    totals: tuple[Tensor, ...] = ()


#: When the slopes of S are made: by the backward pass, which computes S again; by the forward pass, up to a factor; or
#: by the forward pass from an S that is small enough to be stored.
Plan = Literal["later", "at_once", "stored"]


def times(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """x · y; None is 1."""
    return y if x is None else x if y is None else x * y


def largest_finite(x: Tensor) -> Tensor:
    """The largest |x| but for NaN and Inf, which stay in their rows: they must not scale the others. 0 of nothing."""
    size = x.abs()
    return torch.where(torch.isfinite(size), size, 0.0).amax() if x.numel() else x.new_zeros(())


@dataclass(frozen=True)
class Loss(Once):
    """A loss of a (M, D), b (N, D), the weights and scalars; a subclass says what its values and their slopes are.

    Its inputs are a, b, W_diag, W_blocks, the scalars (the scale first), the ids, and the teacher's a, b, W_diag and
    W_blocks.

    Attributes:
        reduction: "mean", "sum" or "none".
        plan: When the slopes are made. Only a summed loss makes them forward.
        wants: A backward pass may follow.
        needs: Which of a, b, W_diag, W_blocks and the scalars have a gradient.
        form: How features become operands.
        teacher: The same of the teacher's, or None.
        parts: The processes' parts of the rows.
        columns: The processes' parts of the columns.
    """

    GRADIENTS = 4
    #: Whether the plans but "later" make the slopes.
    MAKES_SLOPES: ClassVar[bool] = True

    reduction: str
    plan: Plan
    wants: bool
    needs: tuple[bool, ...]
    form: Form
    teacher: Form | None
    parts: Parts
    columns: Parts

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check the loss's own options, its own fields."""

    @abstractmethod
    def values(self, x: Product, *scalars: Any) -> tuple[Tensor, ...]:
        """One loss a row, further results, then what is kept for `slopes`: none of them an input."""

    @abstractmethod
    def slopes(self, x: Product, weight: Tensor, *kept: Any) -> tuple[Tensor, ...]:
        """(slope @ y, slopeᵀ @ t, *totals) of Σ weight · value, weight (M,); `kept` begins with the scalars.

        The totals are the scalars' gradients, of t yᵀ in place of S.
        """

    def at_once(self, x: Product, *scalars: Any) -> tuple[Tensor, ...]:
        """One loss a row, further results, then `slopes` of weights of 1."""
        raise AssertionError(f"{self.NAME} has no such plan")

    def whole(self, x: Product, *scalars: Any) -> Whole:
        """What `stored` takes of an S that is stored, with its slope where one is wanted."""
        raise AssertionError(f"{self.NAME} has no such plan")

    def stream(
        self, epilogue: str, x: Product, scalars: Tensor, rows: Tensor | None = None, columns: Tensor | None = None,
        stored: Sequence[Tensor] = (), **what: bool,
    ) -> Result:  # fmt: skip
        """What the epilogue keeps of S, or of an S that was `stored`; `what` as `streaming.driver.stream` has it."""
        operands = Operands(
            x.t, x.y, scalars, rows, columns, x.row_ids, x.column_ids, x.teacher_t, x.teacher_y, self.parts.own.start,
            *(part if part.numel() else None for part in stored),
        )  # fmt: skip
        return stream(epilogue, operands, backend=self.form.backend, **what)

    @property
    def weight(self) -> float:
        """What the slopes of a stored S are still to be multiplied with."""
        return 1.0

    def stored(self, x: Product, *scalars: Tensor) -> tuple[Tensor, ...]:
        found = self.whole(x, *scalars)
        if found.slope is None:
            return found.rows, *found.further
        return found.rows, *found.further, found.slope @ x.y, found.slope.mT @ x.t, *found.totals

    def _sides(self, a: Tensor, b: Tensor, metric: Metric, form: Form) -> tuple[Side, Side]:
        """Of this process's rows, both."""
        unit_t, unit_y = unit_of(a, metric, form), None
        if form.is_float16 and not form.normalize:
            unit_y = self.columns.max(unit_of(b, IDENTITY, form))
        return prepare(a, metric, form, unit_t), prepare(b, IDENTITY, form, unit_y)

    def _operands(self, inputs: Sequence[Any]) -> tuple[Side, Side, Product]:
        """Both sides, of this process's rows, and the product."""
        a, b, W_diag, W_blocks, *rest = inputs
        ids, *teacher = rest[self.GRADIENTS - 4 :]
        t, y = self._sides(a, b, Metric(W_diag, W_blocks), self.form)
        x = Product(t.rows, self.columns.gather(y.rows), times(t.unit, y.unit))
        if ids is not None:
            ids = self.parts.gather(ids.to(torch.int64, copy=True))
            x = x._replace(row_ids=ids[self.parts.own], column_ids=ids)
        if self.teacher is not None:
            teacher_a, teacher_b, *weights = teacher
            of_rows, of_columns = self._sides(teacher_a, teacher_b, Metric(*weights), self.teacher)
            # Operands that are not float16 are as wide as the student's sums.
            wide = torch.float16 if self.teacher.is_float16 else accumulate_dtype(a.dtype)
            x = x._replace(
                teacher_t=of_rows.rows.to(wide),
                teacher_y=self.columns.gather(of_columns.rows.to(wide)),
                teacher_unit=times(of_rows.unit, of_columns.unit),
            )
        return t, y, x

    def _kept(self, ids: Tensor | None) -> tuple[bool, ...]:
        """Which of (both sides' inverse norms, both units, the product's fields) there are."""
        form, of_teacher, has_teacher = self.form, self.teacher, self.teacher is not None
        norms, half, teacher_half = form.normalize, form.is_float16, of_teacher is not None and of_teacher.is_float16
        # The rows' ids are some of the columns'.
        has_ids = False, ids is not None
        return (
            norms,
            norms,
            half,
            half and not norms,
            True,
            True,
            half,
            *has_ids,
            has_teacher,
            has_teacher,
            teacher_half,
        )

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        with full_precision(inputs[0]):
            t, y, x = self._operands(inputs)
            run = self.values if self.plan == "later" else self.stored if self.plan == "stored" else self.at_once
            loss, *more = run(x, *inputs[4 : self.GRADIENTS])
            if self.reduction != "none":
                loss = self.parts.sum(loss.sum())
            if self.reduction == "mean":
                loss = loss / self.pairs(inputs[0])
        further = (self.RESULTS or 1) - 1
        if not self.wants:
            return loss, *more[:further]
        state = (t.inverse, y.inverse, t.unit, y.unit, *x)
        there = self._kept(inputs[self.GRADIENTS])
        kept: list[Any] = [value for value, is_there in zip(state, there, strict=True) if is_there]
        return loss, *more[:further], *kept, *more[further:]

    def pairs(self, a: Tensor) -> int:
        """Rows of the whole batch, 1 of none: the mean of nothing is 0."""
        return max(a.shape[0] if self.parts.group is None else self.parts.pairs, 1)

    def saved(self, *inputs: Any) -> tuple[Tensor | None, ...]:
        """Not the teacher's."""
        return inputs[: self.GRADIENTS + 1]

    def backward(self, grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        a, b, W_diag, W_blocks = saved[:4]
        scalars, ids, rest = saved[4 : self.GRADIENTS], saved[self.GRADIENTS], iter(saved[self.GRADIENTS + 1 :])
        state: list[Any] = [next(rest) if has else None for has in self._kept(ids)]
        inverse_t, inverse_y, unit_t, unit_y, *fields = state
        x, parts = Product(*fields), self.columns
        if x.column_ids is not None:
            x = x._replace(row_ids=x.column_ids[self.parts.own])
        with full_precision(a):
            factor, weight = self.incoming(grad, a)
            d_t, d_y, *totals = rest if weight is None else self.slopes(x, weight, *scalars, *rest)
            scaled = factor * scalars[0] if scalars else factor
            to_rows, to_columns = (scaled if unit is None else scaled * unit for unit in (unit_y, unit_t))
            if parts.group is not None:  # the rows' unit is each process's own
                d_y, to_columns = parts.sum_own(d_y if unit_t is None else d_y * unit_t), scaled
            of_a, of_b, of_diag, of_blocks = self.needs[:4]
            own = x.y if parts.group is None else x.y[parts.own]
            t, y = Side(x.t, unit_t, inverse_t), Side(own, unit_y, inverse_y)
            metric, needs = Metric(W_diag, W_blocks), (of_a, of_diag, of_blocks)
            da, d_diag, d_blocks = finish(d_t, a, t, metric, to_rows, needs, self.form)
            db, _, _ = finish(d_y, b, y, IDENTITY, to_columns, (of_b, False, False), self.form)
        d_scalars = [total * factor if wanted else None for total, wanted in zip(totals, self.needs[4:], strict=True)]
        if x.unit is not None and scalars and self.needs[4]:
            d_scalars[0] = times(d_scalars[0], x.unit)
        return da, db, cast_like(d_diag, W_diag), cast_like(d_blocks, W_blocks), *d_scalars

    def incoming(self, grad: Tensor, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """A loss's incoming gradient, () or (M,), as (common factor, one weight a row; None of slopes that are made).

        The slopes are made for weights in [−1, 1], so that float16 holds them, in units that all processes share. One
        that is not finite stays so, and in its row. The factor is of the sum of all processes' losses: a scalar is the
        same loss on each of them, so it counts that often.
        """
        grad = grad.to(accumulate_dtype(a.dtype))
        if self.reduction != "none":
            share = self.parts.count / (self.pairs(a) if self.reduction == "mean" else 1)
            if self.MAKES_SLOPES and self.plan != "later":
                return grad * (share * self.weight if self.plan == "stored" else share), None
            return grad * share, grad.new_ones(1).expand(a.shape[0])
        largest = self.parts.max(largest_finite(grad))
        factor = torch.where(largest > 0, largest, torch.ones_like(largest))
        return factor, grad / factor
