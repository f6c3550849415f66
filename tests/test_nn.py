"""The module: starts as exactly the cosine, learns, and behaves as every torch.nn module does."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.reference import assert_close, features, tolerance
from torch import Tensor

import gssf_triton
from gssf_triton.nn import GSSF

TERMS = pytest.mark.parametrize(
    ("diag", "blocks"), [(True, True), (True, False), (False, True)], ids=["both", "diag", "blocks"]
)


def trained(device: str, **options: bool) -> GSSF:
    """A module whose weights are no longer the start's."""
    metric = GSSF(40, block_size=8, **options).to(device)
    with torch.no_grad():
        for weight in metric.parameters():
            weight.normal_()
    return metric


def pair(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return features(9, 40, dtype=dtype, device=device), features(9, 40, dtype=dtype, device=device)


@TERMS
def test_starts_as_the_cosine(diag: bool, blocks: bool, device: str) -> None:
    a, b = pair(device)
    metric = GSSF(40, block_size=8, diag=diag, blocks=blocks).to(device)
    cosine = torch.nn.functional.cosine_similarity(a[:, None].double(), b[None].double(), dim=-1)
    assert_close(metric(a, b), cosine, tolerance(a.dtype))
    assert_close(metric.paired(a, b), cosine.diagonal(), tolerance(a.dtype))
    assert torch.equal(metric.dense(), torch.eye(40, device=device))


def test_the_start_of_each_weight() -> None:
    both = GSSF(64)
    assert torch.equal(both.W_diag, torch.ones(64))
    assert torch.equal(both.W_blocks, torch.zeros(2, 32, 32))  # block_size=32 is the default
    only_blocks = GSSF(64, block_size=16, diag=False)
    assert only_blocks.W_diag is None
    assert torch.equal(only_blocks.W_blocks, torch.eye(16).repeat(4, 1, 1))
    only_diag = GSSF(64, blocks=False)
    assert only_diag.W_blocks is None
    assert torch.equal(only_diag.W_diag, torch.ones(64))


@TERMS
def test_parameters_have_the_functions_names(diag: bool, blocks: bool) -> None:
    metric = GSSF(40, block_size=8, diag=diag, blocks=blocks)
    shapes = {name: tuple(weight.shape) for name, weight in metric.named_parameters()}
    expected = {"W_diag": (40,)} if diag else {}
    assert shapes == expected | ({"W_blocks": (5, 8, 8)} if blocks else {})
    assert set(metric.state_dict()) == set(shapes)


@TERMS
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "as-is"])
def test_methods_are_the_functions(diag: bool, blocks: bool, normalize: bool, device: str) -> None:
    a, b = pair(device)
    metric = trained(device, diag=diag, blocks=blocks, normalize=normalize)
    given = {"W_diag": metric.W_diag, "W_blocks": metric.W_blocks}
    assert torch.equal(metric(a, b), gssf_triton.pairwise_sim(a, b, **given, normalize=normalize))
    assert torch.equal(metric.paired(a, b), gssf_triton.paired_sim(a, b, **given, normalize=normalize))
    assert torch.equal(metric.dense(), gssf_triton.dense_metric(**given))
    if not normalize:
        assert_close(metric.transform(a) @ b.mT, metric(a, b), 2 * tolerance(a.dtype))
        assert_close(a @ metric.transform(b, side="b").mT, metric(a, b), 2 * tolerance(a.dtype))


def test_state_dict_round_trip(device: str) -> None:
    a, b = pair(device)
    metric = trained(device)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    loaded = GSSF(40, block_size=8).to(device)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded(a, b), metric(a, b))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(clone, device: str) -> None:
    a, b = pair(device)
    metric = trained(device, normalize=False)
    other = clone(metric)
    assert torch.equal(other(a, b), metric(a, b))
    with torch.no_grad():
        other.W_diag.zero_()
    assert metric.W_diag.any()


def test_repr_says_what_it_is() -> None:
    text = repr(GSSF(40, block_size=8, diag=False, normalize=False))
    assert text.startswith("GSSF(")
    for part in ("40", "8", "diag=False", "normalize=False"):
        assert part in text


def test_in_bfloat16(device: str) -> None:
    metric = trained(device).to(torch.bfloat16)
    a, b = pair(device, torch.bfloat16)
    S = metric(a, b)
    S.sum().backward()
    assert S.dtype == metric.W_diag.grad.dtype == metric.W_blocks.grad.dtype == torch.bfloat16


def test_float32_weights_serve_bfloat16_features(device: str) -> None:
    metric = trained(device)
    S = metric(*pair(device, torch.bfloat16))
    S.sum().backward()
    assert S.dtype == torch.bfloat16 and metric.W_diag.grad.dtype == metric.W_blocks.grad.dtype == torch.float32


@TERMS
def test_learns_a_planted_metric(diag: bool, blocks: bool, device: str) -> None:
    """From the cosine to a metric of its own family, out of similarities alone: the loss falls a hundredfold."""
    teacher = trained(device, diag=diag, blocks=blocks).requires_grad_(False)
    student = GSSF(40, block_size=8, diag=diag, blocks=blocks).to(device)
    a, b = features(128, 40, device=device), features(128, 40, device=device)
    wanted = teacher(a, b)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    losses = []
    for _ in range(150):
        loss = torch.nn.functional.mse_loss(student(a, b), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
