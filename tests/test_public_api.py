"""The public API, pinned: a change here is a change for every user and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest

import gssf_triton
import gssf_triton.nn

WEIGHTS = "W_diag: Tensor | None = None, W_blocks: Tensor | None = None"
BACKEND = "backend: str = 'auto'"
NUMERICS = f"normalize: bool = False, out_dtype: torch.dtype | None = None, {BACKEND}"

SIGNATURES = {
    "attention": (
        f"(q: Tensor, k: Tensor, v: Tensor, {WEIGHTS}, *, attn_mask: Tensor | None = None, is_causal: bool = False, "
        f"scale: float | None = None, dropout_p: float = 0.0, {BACKEND}) -> Tensor"
    ),
    "dense_metric": f"({WEIGHTS}) -> Tensor",
    "paired_sim": f"(a: Tensor, b: Tensor, {WEIGHTS}, *, {NUMERICS}) -> Tensor",
    "pairwise_sim": f"(a: Tensor, b: Tensor, {WEIGHTS}, *, {NUMERICS}) -> Tensor",
    "pairwise_terms": (
        f"(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor, *, {NUMERICS}) -> tuple[Tensor, Tensor]"
    ),
    "transform": f"(x: Tensor, {WEIGHTS}, *, side: str = 'a', normalize: bool = False, {BACKEND}) -> Tensor",
}

GSSF_SIGNATURES = {
    "__init__": (
        "(self, dim: int, block_size: int = 32, diag: bool = True, blocks: bool = True, normalize: bool = True, *, "
        "device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None"
    ),
    "dense": "(self) -> Tensor",
    "forward": "(self, a: Tensor, b: Tensor) -> Tensor",
    "paired": "(self, a: Tensor, b: Tensor) -> Tensor",
    "reset_parameters": "(self) -> None",
    "transform": "(self, x: Tensor, side: str = 'a') -> Tensor",
}


class _AsWritten(str):
    """A postponed annotation that prints without quotes."""

    __repr__ = str.__str__


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [
        p if p.annotation is p.empty else p.replace(annotation=_AsWritten(p.annotation))
        for p in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=_AsWritten(signature.return_annotation)))


def test_public_names() -> None:
    assert gssf_triton.__all__ == ["__version__", *sorted([*SIGNATURES, "nn"])]


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_signature(name: str) -> None:
    assert _signature(getattr(gssf_triton, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", GSSF_SIGNATURES)
def test_module_signature(name: str) -> None:
    assert _signature(getattr(gssf_triton.nn.GSSF, name)) == GSSF_SIGNATURES[name]


@pytest.mark.parametrize("name", ["nn.GSSF", "nn.GSSFAttention", *SIGNATURES])
def test_docstring_has_an_example_and_the_source(name: str) -> None:
    documented = operator.attrgetter(name)(gssf_triton)
    assert documented.__doc__ and ">>> " in documented.__doc__ and "2410.15266" in documented.__doc__
