"""From a loss's call to its operation: checks, the plan, and operations remembered for calls like an earlier one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gssf_triton import checks
from gssf_triton.backend import resolve_backend
from gssf_triton.kernels import choice
from gssf_triton.losses.common import Loss, Plan
from gssf_triton.losses.processes import spread
from gssf_triton.losses.sides import Form
from gssf_triton.metric import Metric, accumulate_dtype
from gssf_triton.once import in_transform
from gssf_triton.precision import joined, product_dtype
from gssf_triton.processes import kind
from gssf_triton.remembered import Remembered, look
from gssf_triton.streaming.chunks import is_stored

REDUCTIONS = ("mean", "sum", "none")


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or a tensor of one element as a 0-d tensor on like's device, in float32 at least; differentiable."""
    dtype = accumulate_dtype(like.dtype)
    if isinstance(value, Tensor):
        fits = value.dim() == 0 and value.dtype == dtype and value.device == like.device
        return value if fits else value.reshape(()).to(like.device, dtype)
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
