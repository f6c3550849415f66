"""`cross_attention_sim` against SCAN's loop over pairs in float64: shapes, masks, dtypes, gradients."""

from __future__ import annotations

import pytest
import torch
from support.reference import assert_close, features, tolerance
from support.region_word_reference import check, mask, problem
from torch import Tensor

import gssf_triton
from gssf_triton.region_word import pairs

#: (images, captions), (regions, words), (G, B).
SHAPES = {
    "one": ((1, 1), (1, 1), (1, 24)),
    "primes": ((3, 7), (5, 11), (3, 5)),
    "past-a-tile": ((2, 5), (33, 17), (2, 16)),
    "one-word": ((3, 5), (6, 1), (3, 8)),
    "one-region": ((6, 5), (1, 4), (3, 8)),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few pairs, so that small problems have several of them on both sides."""
    monkeypatch.setattr(pairs, "CHUNK_BYTES", {"cpu": 12288, "cuda": 12288})


def _away_from_the_jump(tensors: dict[str, Tensor]) -> None:
    """No region at a right angle to a word: over one word a score by its norm is its sign, which jumps there."""
    regions, words = (tensors[name].detach() for name in ("regions", "words"))
    flat, y = regions.flatten(0, 1), torch.nn.functional.normalize(words.flatten(0, 1), dim=-1)
    while (near := ((torch.nn.functional.normalize(flat, dim=-1) @ y.T).abs() < 0.04).any(1)).any():
        flat[near] = torch.randn_like(flat[near])


@pytest.mark.parametrize(("shape", "smooth"), [*((shape, 9.0) for shape in SHAPES), ("primes", 4.0)])
def test_matches_the_loop(shape: str, smooth: float, backend: str, device: str) -> None:
    items, rows, blocks = SHAPES[shape]
    tensors = problem(items, rows, *blocks, device=device)
    if shape == "one-word":
        _away_from_the_jump(tensors)
    masks = {"region_mask": mask(items[0], rows[0], device), "word_mask": mask(items[1], rows[1], device)}
    check("cross_attention_sim", tensors, smooth=smooth, backend=backend)
    check("cross_attention_sim", tensors, smooth=smooth, backend=backend, **masks)


@pytest.mark.parametrize(("which", "kind"), [("region_mask", "blocks"), ("word_mask", "blocks"), ("both", "diag")])
def test_chunks_agree_with_the_loop(which: str, kind: str, backend: str, device: str, small_chunks: None) -> None:
    tensors = problem((7, 9), (5, 6), 3, 8, kind, device=device)
    masks = {"region_mask": mask(7, 5, device), "word_mask": mask(9, 6, device)}
    if which != "both":
        masks = {which: masks[which]}
    check("cross_attention_sim", tensors, backend=backend, **masks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    tensors = problem((3, 5), (7, 6), 2, 16, dtype=dtype, device=device)
    masks = {"region_mask": mask(3, 7, device), "word_mask": mask(5, 6, device)}
    check("cross_attention_sim", tensors, backend=backend, **masks)


@pytest.mark.parametrize("wanted", ["regions", "words", "W_diag", "W_blocks"])
def test_each_gradient_alone(wanted: str, backend: str, device: str) -> None:
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    for name, x in tensors.items():
        x.requires_grad_(name == wanted)
    check("cross_attention_sim", tensors, backend=backend)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradcheck(masked: bool, device: str) -> None:
    tensors = problem((2, 3), (4, 3), 2, 3, dtype=torch.float64, device=device)
    masks = {"region_mask": mask(2, 4, device), "word_mask": mask(3, 3, device)} if masked else {}

    def call(*leaves: Tensor) -> Tensor:
        return gssf_triton.cross_attention_sim(*leaves, **masks, backend="torch")

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


def test_under_the_identity_it_is_scans_mean_cosine(backend: str, device: str) -> None:
    """SCAN's own score, the average cosine of words and attended regions, lies in [-1, 1] and ignores lengths."""
    regions, words = features(4, 6, 16, device=device), features(5, 7, 16, device=device)
    metric = torch.ones(16, device=device)
    scores = gssf_triton.cross_attention_sim(regions, words, metric, backend=backend)
    assert scores.abs().max() <= 1 + 1e-6
    longer = gssf_triton.cross_attention_sim(3 * regions, 0.5 * words, metric, normalize=True, backend=backend)
    assert_close(longer, scores, 2 * tolerance(torch.float32))


def test_padding_reaches_nothing(backend: str, device: str) -> None:
    """Whatever padding holds, NaN included, scores and gradients are the same, and padding's own gradient is 0."""
    masks = {"region_mask": mask(4, 6, device), "word_mask": mask(5, 7, device)}
    tensors = problem((4, 5), (6, 7), 2, 8, device=device)
    incoming = torch.randn(4, 5, device=device)
    results = []
    for filler in (0.0, 1e4, float("nan"), float("inf")):
        leaves = {name: x.detach().clone() for name, x in tensors.items()}
        for name, valid in zip(("regions", "words"), masks.values(), strict=True):
            leaves[name][~valid] = filler
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        scores = gssf_triton.cross_attention_sim(**leaves, **masks, backend=backend)
        grads = torch.autograd.grad(scores, list(leaves.values()), incoming)
        results.append([scores.detach(), *grads])
        assert not grads[0][~masks["region_mask"]].any() and not grads[1][~masks["word_mask"]].any()
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_close(ours, first, tolerance(torch.float32))


def test_fully_masked_items_score_zero(backend: str, device: str) -> None:
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    region_mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    word_mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    region_mask[1], word_mask[2] = False, False
    scores = gssf_triton.cross_attention_sim(**tensors, region_mask=region_mask, word_mask=word_mask, backend=backend)
    zero = torch.zeros_like(scores, dtype=torch.bool)
    zero[1], zero[:, 2] = True, True
    assert torch.equal(scores == 0, zero)
    d_regions, d_words = torch.autograd.grad(scores.sum(), [tensors["regions"], tensors["words"]])
    assert not d_regions[1].any() and not d_words[2].any()
    assert d_regions[0].any() and d_words[0].any()


@pytest.mark.parametrize(
    ("regions", "words"),
    [((0, 4, 8), (3, 5, 8)), ((2, 4, 8), (0, 5, 8)), ((2, 0, 8), (3, 5, 8)), ((2, 4, 8), (3, 0, 8))],
    ids=["no-image", "no-caption", "no-region", "no-word"],
)
def test_empty(regions: tuple[int, ...], words: tuple[int, ...], backend: str, device: str) -> None:
    leaves = [features(*shape, device=device).requires_grad_() for shape in (regions, words)]
    leaves += [torch.ones(8, device=device, requires_grad=True), torch.ones(2, 4, 4, device=device, requires_grad=True)]
    scores = gssf_triton.cross_attention_sim(*leaves, backend=backend)
    assert torch.equal(scores.detach(), torch.zeros(regions[0], words[0], device=device))
    for x, grad in zip(leaves, torch.autograd.grad(scores.sum(), leaves), strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_rows_of_zeros(backend: str, device: str) -> None:
    """A region or word of zeros has no direction: it is left at 0 and nothing becomes NaN."""
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    with torch.no_grad():
        tensors["regions"][1] = 0
        tensors["words"][2, 3] = 0
    scores = gssf_triton.cross_attention_sim(**tensors, backend=backend)
    grads = torch.autograd.grad(scores.sum(), list(tensors.values()))
    assert all(x.isfinite().all() for x in (scores, *grads)) and not scores[1].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_pairs(poison: float, backend: str, device: str) -> None:
    tensors = {name: x.detach() for name, x in problem((5, 6), (4, 3), 2, 8, device=device).items()}
    clean = gssf_triton.cross_attention_sim(**tensors, backend=backend)
    tensors["regions"][2, 1, 3] = poison
    tensors["words"][4, 2, 5] = poison
    scores = gssf_triton.cross_attention_sim(**tensors, backend=backend)
    bad = torch.zeros_like(scores, dtype=torch.bool)
    bad[2], bad[:, 4] = True, True
    assert_close(scores[~bad], clean[~bad], tolerance(torch.float32))
    assert scores[bad].isnan().all()


def test_same_call_same_bits(backend: str, device: str, small_chunks: None) -> None:
    tensors = problem((5, 7), (6, 5), 3, 8, dtype=torch.bfloat16, device=device)
    masks = {"region_mask": mask(5, 6, device), "word_mask": mask(7, 5, device)}
    incoming = torch.randn(5, 7, device=device)

    def run() -> list[Tensor]:
        scores = gssf_triton.cross_attention_sim(**tensors, **masks, backend=backend)
        return [scores.detach(), *torch.autograd.grad(scores, list(tensors.values()), incoming.to(scores.dtype))]

    for now, before in zip(run(), run(), strict=True):
        assert torch.equal(now, before)


def test_second_derivatives_are_refused(backend: str, device: str) -> None:
    tensors = problem((2, 3), (4, 5), 2, 4, device=device)
    scores = gssf_triton.cross_attention_sim(**tensors, backend=backend)
    (grad,) = torch.autograd.grad(scores.sum(), tensors["words"], create_graph=True)
    with pytest.raises(RuntimeError, match="cross_attention_sim is differentiable once"):
        grad.sum().backward()
