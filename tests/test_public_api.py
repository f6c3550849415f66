"""The public API, pinned: a change here is a change for every user and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest

import gssf_triton
import gssf_triton.metrics
import gssf_triton.nn
import gssf_triton.training

WEIGHTS = "W_diag: Tensor | None = None, W_blocks: Tensor | None = None"
BACKEND = "backend: str = 'auto'"
NUMERICS = f"normalize: bool = False, out_dtype: torch.dtype | None = None, {BACKEND}"

NORMALIZE = "normalize: bool = False"
LIKE = f"(queries: Tensor, gallery: Tensor | np.ndarray, {WEIGHTS}, *"
GROUP = f"group: dist.ProcessGroup | None = None, {BACKEND}"
SEARCH = f"group: dist.ProcessGroup | None = None, progress: bool = False, {BACKEND}"

MASKS = "region_mask: Tensor | None = None, word_mask: Tensor | None = None"

SIGNATURES = {
    "attention": (
        f"(q: Tensor, k: Tensor, v: Tensor, {WEIGHTS}, *, attn_mask: Tensor | None = None, is_causal: bool = False, "
        f"scale: float | None = None, dropout_p: float = 0.0, {BACKEND}) -> Tensor"
    ),
    "cross_attention_sim": (
        f"(regions: Tensor, words: Tensor, {WEIGHTS}, *, {MASKS}, smooth: float = 9.0, {NUMERICS}) -> Tensor"
    ),
    "late_interaction": (
        f"(regions: Tensor, words: Tensor, {WEIGHTS}, *, {MASKS}, pooling: str = 'max-mean', sharpness: float = 1.0, "
        f"{NUMERICS}) -> Tensor"
    ),
    "dense_metric": f"({WEIGHTS}) -> Tensor",
    "distillation_loss": (
        f"(a: Tensor, b: Tensor, {WEIGHTS}, *, teacher_a: Tensor, teacher_b: Tensor, "
        "teacher_W_diag: Tensor | None = None, teacher_W_blocks: Tensor | None = None, "
        f"logit_scale: Tensor | float, {NORMALIZE}, reduction: str = 'mean', {GROUP}) -> Tensor"
    ),
    "info_nce": (
        f"(a: Tensor, b: Tensor, {WEIGHTS}, *, logit_scale: Tensor | float, ids: Tensor | None = None, "
        f"symmetric: bool = True, label_smoothing: float = 0.0, memory: str = 'least', {NORMALIZE}, "
        f"reduction: str = 'mean', {GROUP}) -> Tensor"
    ),
    "paired_sim": f"(a: Tensor, b: Tensor, {WEIGHTS}, *, {NUMERICS}) -> Tensor",
    "pairwise_sim": f"(a: Tensor, b: Tensor, {WEIGHTS}, *, {NUMERICS}) -> Tensor",
    "pairwise_terms": (
        f"(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor, *, {NUMERICS}) -> tuple[Tensor, Tensor]"
    ),
    "ranks": (
        f"{LIKE}, query_ids: Tensor, gallery_ids: Tensor, {NORMALIZE}, exclude: Tensor | None = None, "
        "query_cams: Tensor | None = None, gallery_cams: Tensor | None = None, mask: Tensor | None = None, "
        f"{SEARCH}) -> Tensor"
    ),
    "sigmoid_loss": (
        f"(a: Tensor, b: Tensor, {WEIGHTS}, *, logit_scale: Tensor | float, logit_bias: Tensor | float, "
        f"ids: Tensor | None = None, {NORMALIZE}, reduction: str = 'mean', {GROUP}) -> Tensor"
    ),
    "topk": (
        f"{LIKE}, k: int, {NORMALIZE}, exclude: Tensor | None = None, mask: Tensor | None = None, "
        f"{SEARCH}) -> tuple[Tensor, Tensor]"
    ),
    "transform": f"(x: Tensor, {WEIGHTS}, *, side: str = 'a', normalize: bool = False, {BACKEND}) -> Tensor",
    "triplet_loss": (
        f"(a: Tensor, b: Tensor, {WEIGHTS}, *, margin: float = 0.2, hardest: bool = True, ids: Tensor | None = None, "
        f"{NORMALIZE}, reduction: str = 'sum', return_violations: bool = False, {GROUP}) "
        "-> Tensor | tuple[Tensor, Tensor]"
    ),
}

MEASURED = f"normalize: bool = True, progress: bool = False, {BACKEND}) -> dict[str, float]"
METRIC_SIGNATURES = {
    "image_text": (
        f"(images: Tensor, texts: Tensor, {WEIGHTS}, *, image_ids: Tensor, text_ids: Tensor, "
        f"ks: Sequence[int] = (1, 5, 10), folds: int = 1, {MEASURED}"
    ),
    "reid": (
        f"(queries: Tensor, gallery: Tensor, {WEIGHTS}, *, query_ids: Tensor, gallery_ids: Tensor, "
        f"query_cams: Tensor, gallery_cams: Tensor, ks: Sequence[int] = (1, 5, 10), {MEASURED}"
    ),
    "retrieval": f"(embeddings: Tensor, labels: Tensor, {WEIGHTS}, ks: Sequence[int] = (1, 2, 4, 8), *, {MEASURED}",
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
    assert gssf_triton.__all__ == ["__version__", *sorted([*SIGNATURES, "metrics", "nn", "training"])]


@pytest.mark.parametrize("name", SIGNATURES)
def test_function_signature(name: str) -> None:
    assert _signature(getattr(gssf_triton, name)) == SIGNATURES[name]


def test_metric_names() -> None:
    assert gssf_triton.metrics.__all__ == sorted(METRIC_SIGNATURES)


@pytest.mark.parametrize("name", METRIC_SIGNATURES)
def test_metric_signature(name: str) -> None:
    assert _signature(getattr(gssf_triton.metrics, name)) == METRIC_SIGNATURES[name]


@pytest.mark.parametrize("name", GSSF_SIGNATURES)
def test_module_signature(name: str) -> None:
    assert _signature(getattr(gssf_triton.nn.GSSF, name)) == GSSF_SIGNATURES[name]


def test_training_signatures() -> None:
    assert gssf_triton.training.__all__ == ["CachedBackward"]
    made = _signature(gssf_triton.training.CachedBackward.__init__)
    assert made == "(self, tower: nn.Module, *, chunk_size: int) -> None"


@pytest.mark.parametrize(
    "name",
    [
        "nn.GSSF",
        "nn.GSSFAttention",
        "training.CachedBackward",
        *SIGNATURES,
        *(f"metrics.{name}" for name in METRIC_SIGNATURES),
    ],
)
def test_docstring_has_an_example_and_the_source(name: str) -> None:
    documented = operator.attrgetter(name)(gssf_triton)
    assert documented.__doc__ and ">>> " in documented.__doc__ and "2410.15266" in documented.__doc__
