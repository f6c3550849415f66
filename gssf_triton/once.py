"""Functions whose gradients are written by hand: differentiable once, by autograd, torch.compile and torch.func alike.

All three see it as one step, which runs on plain tensors; under `torch.func.vmap` it runs once for each of the batch. A
gradient of a gradient is an error, never a gradient of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Inputs = tuple[Tensor | None, ...]


def in_transform() -> bool:
    """True under torch.func (vmap, grad, …) and forward mode, whose tensors do not say whether they want a gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Once(ABC):
    """A function of tensors; a frozen dataclass of its other arguments defines `forward`, `saved` and `backward`.

    The first of its `RESULTS` is the one with a gradient, unless `GRADIENTS` is 0.
    """

    #: The public function's name.
    NAME: ClassVar[str]
    #: How many tensors a caller gets, all of them where None; what `forward` returns beyond is kept for the gradient.
    RESULTS: ClassVar[int | None] = 1
    #: How many of the inputs, the first ones, have a gradient.
    GRADIENTS: ClassVar[int] = 0

    @abstractmethod
    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The results, then what is kept: none of them an input."""

    def saved(self, *inputs: Any) -> Inputs:
        """Which of the inputs the gradient reads."""
        return inputs

    def backward(self, grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        """The first inputs' gradients, of the first result's, what `saved` chose and what `forward` kept."""
        raise AssertionError(f"{self.NAME} has no gradient")

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or in_transform():
            # Views: the compiler refuses a tensor that is given twice, and overlooks that a transform's own wants a
            # gradient.
            views = (None if x is None else x.view_as(x) for x in inputs)
            return tuple(_Forward.apply(self, *views)[: self.RESULTS])
        if not torch.is_grad_enabled():
            return self.forward(*inputs)[: self.RESULTS]
        if any(x is not None and x.requires_grad for x in inputs[: self.GRADIENTS]):
            return tuple(_Eager.apply(self, *inputs)[: self.RESULTS])
        with torch.no_grad():
            return self.forward(*inputs)[: self.RESULTS]


@dataclass(frozen=True)
class Plainly(Once):
    """A function of tensors that has no gradient."""

    RESULTS = None

    function: Callable[..., tuple[Tensor, ...]]

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return self.function(*inputs)


def _one_by_one(function: Callable[..., Any], info: Any, in_dims: Any, op: Once, *inputs: Any) -> Any:
    """vmap's rule: a call for each of the batch."""

    def call(i: int) -> Any:
        parts = (x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims[1:], strict=True))
        return function(op, *parts)

    results = zip(*(call(i) for i in range(info.batch_size)), strict=True)
    outputs = tuple(None if parts[0] is None else torch.stack(parts) for parts in results)
    return outputs, tuple(None if x is None else 0 for x in outputs)


def _keep(
    ctx: Any, op: Once, tensors: tuple[Any, ...], output: tuple[Tensor, ...], returned: tuple[Tensor, ...]
) -> None:
    ctx.op, ctx.count = op, len(tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*returned[1 if op.GRADIENTS else 0 :])
    if op.GRADIENTS:
        ctx.save_for_backward(*op.saved(*tensors), *output[op.RESULTS :])


def _gradients(ctx: Any, grad: Tensor | None, compute: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (1 + ctx.count)
    return None, *compute(grad, *ctx.saved_tensors), *(None,) * (ctx.count - ctx.op.GRADIENTS)


class _Forward(torch.autograd.Function):
    """For the compiler and torch.func."""

    @staticmethod
    def forward(op: Any, *inputs: Any) -> Any:
        # The compiler puts a context first where nothing wants a gradient: it counts the names in the line above.
        if not isinstance(op, Once):
            op, inputs = inputs[0], inputs[1:]
        return op.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _keep(ctx, inputs[0], inputs[1:], output, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op: Once = ctx.op
        # The compiler differentiates nothing twice, and refuses to.
        return _gradients(ctx, grads[0], op.backward if torch.compiler.is_compiling() else partial(_Gradient.apply, op))

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, *inputs: Any) -> Any:
        return _one_by_one(_Forward.apply, info, in_dims, op, *inputs)


class _Eager(torch.autograd.Function):
    """The same, without the 20 µs that a function costs whose context is set up apart."""

    @staticmethod
    def forward(ctx: Any, op: Once, *inputs: Any) -> Any:
        output = op.forward(*inputs)
        returned = output[: op.RESULTS]
        _keep(ctx, op, inputs, output, returned)
        return returned

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op: Once = ctx.op
        return _gradients(ctx, grads[0], partial(_Gradient.apply, op) if torch.is_grad_enabled() else op.backward)


class _Gradient(torch.autograd.Function):
    """The gradients, as a function of its own: differentiating them is then an error."""

    @staticmethod
    def forward(op: Once, grad: Tensor, *saved: Any) -> Any:
        return op.backward(grad, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0].NAME

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is differentiable once, and its gradient was to be differentiated (a gradient penalty, "
            "torch.func.hessian): build it from gssf_triton.pairwise_sim, which is differentiable twice"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, *inputs: Any) -> Any:
        return _one_by_one(_Gradient.apply, info, in_dims, op, *inputs)
