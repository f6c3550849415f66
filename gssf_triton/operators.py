"""Custom operators, which cost a plain call nothing.

An operator of `torch.library` passes Python's dispatcher several times: 12 µs a call, 30 with a gradient. A compiler,
torch.func, a mode and a subclass of Tensor need that. Other calls run the operator's function itself, within a
`torch.autograd.Function` of the operator's backward pass if a gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

#: The types of tensors whose operations nothing intercepts.
PLAIN = frozenset((Tensor, Parameter, type(None)))

try:
    from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
    from torch._C._functorch import is_legacy_batchedtensor
except ImportError:  # a torch that keeps these elsewhere: no call is plain
    PLAIN = frozenset()


def is_plain(*tensors: Tensor | None) -> bool:
    """True if nothing but autograd's backward pass looks at what is computed of these tensors."""
    if (
        not PLAIN.issuperset(map(type, tensors))
        or torch.compiler.is_compiling()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    ):
        return False
    # The former are of `is_grads_batched` and of vectorised Jacobians; of the latter, imaginary parts of conjugates,
    # torch makes plain numbers for an operator.
    return not any(is_legacy_batchedtensor(x) or x.is_neg() for x in tensors if x is not None)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Operator:
    """A custom operator; the first of its arguments are all those that are tensors, or None.

    Of several results the function may return None for some; the custom operator returns an empty tensor there.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.custom = torch.library.custom_op(name, _without_none(function), mutates_args=(), schema=schema)
        self.register_fake = self.custom.register_fake
        self.tensors = sum("Tensor" in str(argument.type) for argument in self.custom._opoverload._schema.arguments)
        self.recorded: Any = None

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None], results: int | None = None
    ) -> None:
        """As torch.library's. `results`: how many there are for a caller; the rest only the backward pass needs."""
        self.custom.register_autograd(backward, setup_context=setup_context)
        self.recorded = _recorded(self.function, backward, setup_context, results)

    def __call__(self, *inputs: Any) -> Any:
        tensors = inputs[: self.tensors]
        if not is_plain(*tensors):
            return self.custom(*inputs)
        return self.recorded.apply(*inputs) if wants_gradient(*tensors) else self.function(*inputs)


def _without_none(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        results = function(*inputs)
        if not isinstance(results, tuple):
            return results
        like = next(x for x in inputs if isinstance(x, Tensor))
        return tuple(like.new_empty(0) if x is None else x for x in results)

    return call


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator that makes an `Operator` of a function."""
    return lambda function: Operator(name, schema, function)


def _recorded(
    function: Callable[..., Any], backward: Callable[..., Any], setup: Callable[..., None], results: int | None
) -> Any:
    class Recorded(torch.autograd.Function):
        """The function and its backward pass. With a `setup_context` of its own torch would take 20 µs more."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup(ctx, inputs, output)
            return output if results is None else output[:results]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    return Recorded
