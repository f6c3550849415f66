"""What the losses share: checks, folding, the operands of the product, the autograd function and the reduction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels import choice
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.losses.processes import Parts, spread
from gssf_triton.losses.sides import Form, Side, finish, prepare, unit_of
from gssf_triton.metric import IDENTITY, Metric, accumulate_dtype
from gssf_triton.once import Once, in_transform
from gssf_triton.precision import full_precision, joined, product_dtype
from gssf_triton.processes import kind
from gssf_triton.remembered import Remembered, look
from gssf_triton.similarity.bilinear import cast_like
from gssf_triton.streaming.chunks import is_stored
from gssf_triton.streaming.driver import Result, stream

REDUCTIONS = ("mean", "sum", "none")


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
        d_scalars = [total * factor for total in totals]
        if x.unit is not None and scalars:
            d_scalars[0] = d_scalars[0] * x.unit
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


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor on like's device, in float32 at least; differentiable."""
    dtype = accumulate_dtype(like.dtype)
    if isinstance(value, Tensor):
        return value.reshape(()).to(like.device, dtype)
    return torch.full((), float(value), dtype=dtype, device=like.device)


#: The operations of earlier calls.
_OPERATIONS = Remembered[Loss]()


class Sides(NamedTuple):
    """Features of both sides, and the metric between them; nothing of it is checked."""

    a: Any
    b: Any
    metric: Metric

    @property
    def is_even(self) -> bool:
        """Whether both are tensors of one dtype."""
        return isinstance(self.a, Tensor) and isinstance(self.b, Tensor) and self.a.dtype == self.b.dtype

    def look(self) -> Hashable:
        return look(self.a), look(self.b), look(self.metric.W_diag), look(self.metric.W_blocks)

    def described(self, form: Form) -> dict[str, object]:
        metric = self.metric
        return {
            "D": self.a.shape[1], "dtype": self.a.dtype, "W_diag": kind(metric.W_diag),
            "W_blocks": kind(metric.W_blocks), "normalize": form.normalize, "backend": form.backend,
        }  # fmt: skip

    def checked(self, normalize: bool, backend: str, *, paired: bool, prefix: str = "") -> Sides:
        """The same, once they fit; under autocast in one dtype. `paired` wants as many rows on both sides.

        `prefix` is what the arguments' names begin with. A teacher ("teacher_") may have no weight: plain dot products.
        """
        names, (a, b, metric) = (f"{prefix}a", f"{prefix}b"), self
        checks.check_flags(normalize=normalize)
        checks.check_batches(a, b, names, paired=paired)
        if not (prefix and metric.is_identity):
            checks.check_weights(names[0], a, metric.W_diag, metric.W_blocks, prefix=prefix)
        a, b = joined(a, b)
        checks.check_same_dtype(a, b, names)
        resolve_backend(backend, a, metric.W_blocks)
        return Sides(a, b, metric)

    def form(self, normalize: bool, backend: str) -> Form:
        return Form(
            normalize, product_dtype(self.a).itemsize == 2, resolve_backend(backend, self.a, self.metric.W_blocks)
        )


def check_reduction(reduction: str, group: object) -> None:
    """What all losses take besides their inputs."""
    checks.check_choice("reduction", reduction, REDUCTIONS)
    checks.check_group(group)


class Batch(NamedTuple):
    """What a loss is called with, besides its own options. Nothing of it is checked.

    Attributes:
        student: The features, and the metric that learns.
        normalize: Rows are put on the unit sphere first.
        reduction: "mean", "sum" or "none".
        group: The processes that hold the batch, or None.
        backend: "auto", "triton" or "torch".
        scalars: By name, the scale first.
        ids: (M,) integers, or None.
        teacher: The teacher's features, or None; without one b[i] matches a[i].
    """

    student: Sides
    normalize: bool
    reduction: str
    group: dist.ProcessGroup | None
    backend: str
    scalars: Mapping[str, Tensor | float]
    ids: Tensor | None = None
    teacher: Sides | None = None

    def run(self, loss: type[Loss], **options: Any) -> tuple[Tensor, ...]:
        """The loss reduced, and its further results. `options` are its fields, and what all processes must agree on."""
        batch, key = self, self._key(loss, options)
        op = _OPERATIONS.get(key)
        if op is None or not self._computes_by(op.form.backend):
            loss.check_options(**options)
            batch = self._checked()
            op = batch._operation(loss, options)
            _OPERATIONS.put(key, op)
        a, b, metric = batch.student
        scalars = (scalar(value, a) for value in self.scalars.values())
        of_teacher: tuple[Tensor | None, ...] = ()
        if batch.teacher is not None:
            x, y, fixed = batch.teacher
            of_teacher = tuple(None if z is None else z.detach() for z in (x, y, fixed.W_diag, fixed.W_blocks))
        return op(a, b, metric.W_diag, metric.W_blocks, *scalars, self.ids, *of_teacher)

    def _computes_by(self, backend: str) -> bool:
        """Whether `backend` is still what computes the call."""
        a, _, metric = self.student
        if backend == "torch" and (self.backend == "torch" or (self.backend == "auto" and not a.is_cuda)):
            return True
        return backend == resolve_backend(self.backend, a, metric.W_blocks)

    def _wants(self) -> tuple[bool, ...]:
        """Which of a, b, the weights and the scalars have a gradient."""
        a, b, metric = self.student
        inputs = a, b, metric.W_diag, metric.W_blocks, *self.scalars.values()
        if not torch.is_grad_enabled():
            return (False,) * len(inputs)
        # In a transform tensors do not say so.
        every = in_transform()
        return tuple([isinstance(x, Tensor) and (every or x.requires_grad) for x in inputs])

    def _key(self, loss: type[Loss], options: Mapping[str, Any]) -> Hashable | None:
        """All that checks and choices depend on; None where they are to be made anew."""
        student, teacher, version = self.student, self.teacher, choice.version()
        # Two dtypes, which autocast allows, are brought to one anew every time.
        if self.group is not None or version is None or not student.is_even or not (teacher is None or teacher.is_even):
            return None
        return (
            loss, student.look(), None if teacher is None else teacher.look(), look(self.ids), look(self.normalize),
            self.reduction, self.backend, self._wants(), product_dtype(student.a),
            None if teacher is None else product_dtype(teacher.a), version,
            *[look(x) if isinstance(x, Tensor) else type(x) for x in self.scalars.values()],
            *map(look, options.values()),
        )  # fmt: skip

    def _checked(self) -> Batch:
        """The same, once all of it fits."""
        student = self.student.checked(self.normalize, self.backend, paired=self.teacher is None)
        a, teacher = student.a, self.teacher
        if teacher is not None:
            teacher = teacher.checked(self.normalize, self.backend, paired=False, prefix="teacher_")
            for name, x, like, of in (("teacher_a", teacher.a, a, "a"), ("teacher_b", teacher.b, student.b, "b")):
                checks.check_same_device(of, like, name, x)
                if x.shape[0] != like.shape[0]:
                    raise ValueError(
                        f"{name} must have {like.shape[0]} rows, as {of} {tuple(like.shape)} has, got {tuple(x.shape)}"
                    )
        check_reduction(self.reduction, self.group)
        if self.ids is not None:
            checks.check_labels("ids", self.ids, a.shape[0], "a", a)
        for name, value in self.scalars.items():
            checks.check_scalar(name, value, "a", a)
        return self._replace(student=student, teacher=teacher)

    def _operation(self, loss: type[Loss], options: Mapping[str, Any]) -> Loss:
        """The loss as a function of tensors; with a group, once all processes call it."""
        (a, b, _), form, wants = self.student, self.student.form(self.normalize, self.backend), self._wants()
        lengths = (a.shape[0],) if self.teacher is None else (a.shape[0], b.shape[0])
        call = self._described(loss.NAME, form, wants, options) if self.group is not None else {}
        parts, *others = spread(self.group, lengths, a.device, call)
        return loss(
            self.reduction, self._plan(loss, form, any(wants)), any(wants), wants,
            form, None if self.teacher is None else self.teacher.form(self.normalize, self.backend), parts,
            others[0] if others else parts, **options,
        )  # fmt: skip

    def _plan(self, loss: type[Loss], form: Form, wants: bool) -> Plan:
        if self.reduction == "none":
            return "later"
        a, b, _ = self.student
        (M, D), N = a.shape, b.shape[0]
        if form.backend == "torch" and self.group is None and is_stored(M, N, D, form.dtype(a), a.device):
            return "stored"
        return "at_once" if wants and loss.at_once is not Loss.at_once else "later"

    def _described(self, name: str, form: Form, wants: Sequence[bool], options: Mapping[str, Any]) -> dict[str, object]:
        """What every process must do alike: one that takes no part in a collective leaves the others waiting."""
        of_a, of_b, of_diag, of_blocks, *of_scalars = wants
        # The rows' own gradients take part in none.
        gradients = of_a or of_diag or of_blocks, of_b
        matched: dict[str, object] = {"ids": self.ids is not None}
        if self.teacher is not None:
            matched = {"teacher": self.teacher.described(self.teacher.form(self.normalize, self.backend))}
        return {
            "loss": name, **self.student.described(form), "half": form.half, "gradients": gradients,
            "of scalars": tuple(of_scalars), **self.scalars, **matched, **options, "reduction": self.reduction,
        }  # fmt: skip
