"""The metric in open_clip's own losses, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss
from open_clip_process import half_of_a_batch
from support import reference
from support.gloo import in_processes
from support.reference import features
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from gssf_triton.integrations.open_clip import GSSFLoss
from gssf_triton.nn import GSSF

DIM, BLOCK, N = 24, 8, 6
SCALE = torch.tensor(10.0)


def unit(n: int = N) -> Tensor:
    return torch.nn.functional.normalize(features(n, DIM), dim=-1)


def trained(**options: Any) -> GSSF:
    metric = GSSF(DIM, BLOCK, **options)
    with torch.no_grad():
        for weight in metric.parameters():
            weight.normal_()
    return metric


def logits(metric: GSSF, images: Tensor, texts: Tensor) -> Tensor:
    weights = metric.W_diag.detach().double(), metric.W_blocks.detach().double()
    return SCALE.double() * reference.pairwise_sim(images.double(), texts.double(), *weights)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_clip_loss_under_an_asymmetric_metric(normalize: bool) -> None:
    """Images to texts by rows, texts to images by columns of one matrix."""
    images, texts, metric = unit(), unit(), trained(normalize=normalize)
    S, pairs = logits(metric, images, texts), torch.arange(N)
    loss = GSSFLoss(ClipLoss(), metric)
    close(loss(images, texts, SCALE), (cross_entropy(S, pairs) + cross_entropy(S.T, pairs)) / 2)
    per_image, per_text = loss.loss.get_logits(loss.fold(images), texts, SCALE)
    close(per_image, S)
    close(per_text, S.T)
    assert not torch.allclose(S, logits(metric, texts, images).T)  # what a fold of the text side would have given


def test_every_loss_starts_as_it_was() -> None:
    images, texts, metric = unit(), unit(), GSSF(DIM, BLOCK)
    tokens = {"logits": torch.randn(N, 5, 11), "labels": torch.randint(1, 11, (N, 5))}
    teacher = {"dist_image_features": unit(), "dist_text_features": unit(), "dist_logit_scale": SCALE}
    cases: list[tuple[Any, dict[str, Any]]] = [
        (ClipLoss(), {}),
        (ClipLoss(), {"logit_bias": torch.tensor(0.5), "output_dict": True}),
        (SigLipLoss(), {"logit_bias": torch.tensor(-3.0)}),
        (CoCaLoss(2.0, 1.0), tokens),
        (DistillClipLoss(), teacher),
    ]
    for loss, options in cases:
        call = {"image_features": images, "text_features": texts, "logit_scale": SCALE, **options}
        ours, theirs = GSSFLoss(loss, metric)(**call), loss(**call)
        for actual, expected in zip(
            *(x.values() if isinstance(x, dict) else [x] for x in (ours, theirs)), strict=False
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_siglip_loss_under_a_trained_metric() -> None:
    images, texts, metric, bias = unit(), unit(), trained(), torch.tensor(-2.0)
    S = logits(metric, images, texts) + bias
    expected = -logsigmoid((2 * torch.eye(N) - 1) * S).sum() / N
    close(GSSFLoss(SigLipLoss(), metric)(images, texts, SCALE, bias), expected)


def test_distillation_leaves_the_teacher_alone() -> None:
    images, texts, metric = unit(), unit(), trained()
    teacher = {"dist_image_features": unit(), "dist_text_features": unit(), "dist_logit_scale": SCALE}
    _, distilled = GSSFLoss(DistillClipLoss(), metric)(images, texts, SCALE, **teacher)
    S = logits(metric, images, texts)
    T = SCALE.double() * teacher["dist_image_features"].double() @ teacher["dist_text_features"].double().T
    terms = [-(t.softmax(-1) * s.log_softmax(-1)).sum(-1).mean() for t, s in ((T, S), (T.T, S.T))]
    close(distilled, sum(terms) / 2)


def test_a_small_model_trains_with_it() -> None:
    model = open_clip.CLIP(
        embed_dim=DIM,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
        text_cfg={"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        output_dict=True,
    )
    loss = GSSFLoss(ClipLoss(), GSSF(DIM, BLOCK))
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=1e-2)
    images, texts = torch.randn(N, 3, 16, 16), torch.randint(1, 20, (N, 6))
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(**model(images, texts), output_dict=True)["contrastive_loss"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]
    assert loss.metric.W_blocks.any() and not torch.equal(loss.metric.W_diag, torch.ones(DIM))


def test_zero_shot_classification() -> None:
    images, classifier, metric = unit(), unit(4), trained()
    close(GSSFLoss(ClipLoss(), metric).fold(images) @ classifier.T * SCALE, logits(metric, images, classifier))


def test_metric_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"gssf_triton\.nn\.GSSF, got Linear"):
        GSSFLoss(ClipLoss(), torch.nn.Linear(2, 2))


def test_two_processes_are_one_batch(tmp_path: Path) -> None:
    """Loss and the metric's gradients, whether each process scores its own half or all."""
    images, texts, metric = unit(), unit(), trained()
    torch.save({"images": images, "texts": texts, "metric": metric.state_dict()}, tmp_path / "data.pt")
    in_processes(2, half_of_a_batch, DIM, BLOCK, float(SCALE), str(tmp_path))
    expected = GSSFLoss(ClipLoss(), metric)(images, texts, SCALE)
    expected.backward()
    for found in torch.load(tmp_path / "found.pt").values():
        close(found["loss"], expected.detach())
        for name, weight in metric.named_parameters():
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-4, atol=1e-6)
