"""Devices without float64, such as Apple's: float32 features make no float64 tensor anywhere, forward or backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.reference import features
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gssf_triton
from gssf_triton import nn
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.streaming.epilogues import EPILOGUES, Chunk, index_bits


class NoFloat64(TorchDispatchMode):
    """A device that holds no float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)):
            raise TypeError(f"{func} made a float64 tensor")
        return out


W = {"W_diag": torch.rand(16) + 0.5, "W_blocks": torch.randn(4, 4, 4) / 8}
IDS = torch.arange(8) // 2
ROWS, OTHERS, TAUGHT = features(8, 16), features(8, 16), features(8, 6)
REGIONS, WORDS = features(2, 3, 16), features(3, 4, 16)
Call = Callable[[Tensor, str], Any]
DIFFERENTIABLE: dict[str, Call] = {
    "pairwise_sim": lambda x, be: gssf_triton.pairwise_sim(x, OTHERS, **W, normalize=True, backend=be),
    "pairwise_terms": lambda x, be: sum(gssf_triton.pairwise_terms(x, OTHERS, **W, backend=be)),
    "paired_sim": lambda x, be: gssf_triton.paired_sim(x, OTHERS, **W, normalize=True, backend=be),
    "transform": lambda x, be: gssf_triton.transform(x, **W, backend=be),
    "info_nce": lambda x, be: gssf_triton.info_nce(
        x, OTHERS, **W, logit_scale=9.0, ids=IDS, label_smoothing=0.1, backend=be
    ),
    "info_nce, a value a pair": lambda x, be: gssf_triton.info_nce(
        x, OTHERS, **W, logit_scale=9.0, reduction="none", backend=be
    ),
    "sigmoid_loss": lambda x, be: gssf_triton.sigmoid_loss(
        x, OTHERS, **W, logit_scale=9.0, logit_bias=-1.0, ids=IDS, backend=be
    ),
    "triplet_loss": lambda x, be: gssf_triton.triplet_loss(x, OTHERS, **W, ids=IDS, backend=be),
    "triplet_loss, all": lambda x, be: gssf_triton.triplet_loss(x, OTHERS, **W, hardest=False, backend=be),
    "distillation_loss": lambda x, be: gssf_triton.distillation_loss(
        x, OTHERS, **W, teacher_a=TAUGHT, teacher_b=TAUGHT, logit_scale=9.0, backend=be
    ),
    "late_interaction": lambda x, be: gssf_triton.late_interaction(x.view(2, 4, 16), WORDS, **W, backend=be),
    "late_interaction, lse": lambda x, be: gssf_triton.late_interaction(
        x.view(2, 4, 16), WORDS, **W, pooling="lse-mean", normalize=True, backend=be
    ),
    "cross_attention_sim": lambda x, be: gssf_triton.cross_attention_sim(x.view(2, 4, 16), WORDS, **W, backend=be),
    "attention": lambda x, be: gssf_triton.attention(x[None], x[None], OTHERS[None], **W, is_causal=True),
    "nn.InfoNCELoss": lambda x, be: nn.InfoNCELoss(nn.GSSF(16, 4), backend=be)(x, OTHERS),
    "nn.SigmoidLoss": lambda x, be: nn.SigmoidLoss(nn.GSSF(16, 4), backend=be)(x, OTHERS),
    "nn.TripletLoss": lambda x, be: nn.TripletLoss(nn.GSSF(16, 4), backend=be)(x, OTHERS),
    "nn.DistillationLoss": lambda x, be: nn.DistillationLoss(nn.GSSF(16, 4), backend=be)(x, OTHERS, TAUGHT, TAUGHT),
}
SEARCHES: dict[str, Call] = {
    "topk": lambda x, be: gssf_triton.topk(x, OTHERS, **W, k=3, normalize=True, backend=be),
    "ranks": lambda x, be: gssf_triton.ranks(x, OTHERS, **W, query_ids=IDS, gallery_ids=IDS, backend=be),
    "metrics.image_text": lambda x, be: gssf_triton.metrics.image_text(
        x, OTHERS, **W, image_ids=IDS, text_ids=IDS, folds=2, backend=be
    ),
    "metrics.retrieval": lambda x, be: gssf_triton.metrics.retrieval(x, IDS, **W, backend=be),
    "metrics.reid": lambda x, be: gssf_triton.metrics.reid(
        x, OTHERS, **W, query_ids=IDS, gallery_ids=IDS, query_cams=IDS, gallery_cams=1 - IDS, backend=be
    ),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functions_and_gradients(name: str, backend: str) -> None:
    x = ROWS.clone().requires_grad_()
    with NoFloat64():
        out = DIFFERENTIABLE[name](x, backend)
        out.sum().backward()
    assert out.dtype == torch.float32 and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_and_metrics(name: str, backend: str) -> None:
    expected = SEARCHES[name](ROWS, backend)
    with NoFloat64():
        found = SEARCHES[name](ROWS, backend)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_test_itself() -> None:
    with pytest.raises(TypeError, match="made a float64 tensor"), NoFloat64():
        ROWS.double()


def test_the_hardest_negative_of_a_batch_that_float32_cannot_count() -> None:
    """Indices lie in float32 states as an integer's bits: past 2²⁴ rows a float32 would skip every other one."""
    epilogue, start, y = EPILOGUES["hinge_hardest"], 2**24, torch.zeros(2**24 + 8, 1)
    y[start + 5], y[start + 6] = -1.0, 1.0
    ids = torch.zeros(3, dtype=torch.int64), torch.ones(1, dtype=torch.int64).expand(len(y))
    x = Operands(torch.tensor([[1.0], [-1.0], [0.0]]), y, torch.ones(1), None, None, *ids)
    chunk = slice(0, 3), slice(start, len(y))
    kept = epilogue.torch(Chunk(x, epilogue, False, *chunk))
    assert index_bits(kept.rows[1]).tolist() == [start + 6, start + 5, start], "the lowest of equal ones"
    alike = x._replace(column_ids=torch.zeros(1, dtype=torch.int64).expand(len(y)))
    assert index_bits(epilogue.torch(Chunk(alike, epilogue, False, *chunk)).rows[1]).eq(-1).all(), "no negative"
