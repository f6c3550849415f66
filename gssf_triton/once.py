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

Inputs = tuple[Tensor | None, ...]


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

    def backward(self, grad: Tensor, *saved: Any) -> tuple[Tensor, ...]:
        """The first inputs' gradients, of the first result's, what `saved` chose and what `forward` kept."""
        raise AssertionError(f"{self.NAME} has no gradient")

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(_Forward.apply(self, *_distinct(inputs))[: self.RESULTS])


@dataclass(frozen=True)
class Plainly(Once):
    """A function of tensors that has no gradient."""

    RESULTS = None

    function: Callable[..., tuple[Tensor, ...]]

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return self.function(*inputs)


def _distinct(inputs: Inputs) -> Inputs:
    """The inputs with no tensor twice, which the compiler refuses: a view of it instead."""
    found: list[Tensor | None] = []
    for x in inputs:
        twice = x is not None and any(x is other for other in found)
        found.append(x.view_as(x) if x is not None and twice else x)
    return tuple(found)


def _one_by_one(function: Callable[..., Any], info: Any, in_dims: Any, op: Once, *inputs: Any) -> Any:
    """vmap's rule: a call for each of the batch."""

    def call(i: int) -> Any:
        parts = (x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims[1:], strict=True))
        return function(op, *parts)

    outputs = tuple(torch.stack(parts) for parts in zip(*(call(i) for i in range(info.batch_size)), strict=True))
    return outputs, (0,) * len(outputs)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(op: Any, *inputs: Any) -> Any:
        # The compiler puts a context first where nothing wants a gradient: it counts the names in the line above.
        if not isinstance(op, Once):
            op, inputs = inputs[0], inputs[1:]
        return op.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        op, *tensors = inputs
        ctx.op, ctx.count = op, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1 if op.GRADIENTS else 0 :])
        if op.GRADIENTS:
            ctx.save_for_backward(*op.saved(*tensors), *output[op.RESULTS :])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        op: Once = ctx.op
        if grads[0] is None:
            return (None,) * (1 + ctx.count)
        # The compiler differentiates nothing twice, and refuses to.
        gradient = op.backward if torch.compiler.is_compiling() else partial(_Gradient.apply, op)
        gradients = gradient(grads[0], *ctx.saved_tensors)
        return None, *gradients, *(None,) * (ctx.count - op.GRADIENTS)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, *inputs: Any) -> Any:
        return _one_by_one(_Forward.apply, info, in_dims, op, *inputs)


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
