"""`late_interaction` against a loop over pairs in float64: poolings, masks, shapes, dtypes, gradients, memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.reference import Largest, assert_close, far_apart, features, tolerance
from support.region_word_reference import check, mask, problem
from torch import Tensor

import gssf_triton
from gssf_triton.region_word import packing, pairs

POOLINGS = ["max-mean", "lse-mean", "max-sum"]
poolings = pytest.mark.parametrize("pooling", POOLINGS)
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["as-is", "normalize"])

#: (images, captions), (regions, words), (G, B): one of everything, primes, just past a tile, D and B no power of two.
SHAPES = {
    "one": ((1, 1), (1, 1), (1, 24)),
    "primes": ((3, 7), (5, 11), (3, 5)),
    "past-a-tile": ((2, 5), (33, 17), (2, 16)),
    "many-regions": ((2, 2), (70, 3), (1, 24)),
    "fewer-words": ((5, 2), (6, 3), (2, 8)),
    "one-region": ((6, 5), (1, 4), (3, 8)),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few pairs, so that small problems have several of them on both sides."""
    monkeypatch.setattr(pairs, "CHUNK_BYTES", {"cpu": 2048, "cuda": 2048})


@poolings
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_loop(shape: str, pooling: str, backend: str, device: str) -> None:
    # Unit rows and, in the interpreter, masks by turns: each pooling meets all four kinds of both, each shape both.
    turn, first = list(SHAPES).index(shape), POOLINGS.index(pooling)
    normalize, masked = bool((turn + first) % 2), bool((turn // 2 + first) % 2)
    items, rows, blocks = SHAPES[shape]
    tensors = problem(items, rows, *blocks, device=device)
    masks = {"region_mask": mask(items[0], rows[0], device), "word_mask": mask(items[1], rows[1], device)}
    options = {"pooling": pooling, "sharpness": 4.0, "normalize": normalize, "backend": backend}
    if backend == "torch" or device == "cuda" or not masked:
        check("late_interaction", tensors, **options)
    if backend == "torch" or device == "cuda" or masked:
        check("late_interaction", tensors, **masks, **options)


def test_more_than_a_thousand_channels(backend: str, device: str) -> None:
    tensors = problem((2, 2), (3, 2), 103, 10, device=device)
    check("late_interaction", tensors, pooling="lse-mean", sharpness=4.0, normalize=True, backend=backend)


@poolings
@pytest.mark.parametrize("which", ["region_mask", "word_mask", "both"])
def test_chunks_agree_with_the_loop(pooling: str, which: str, backend: str, device: str, small_chunks: None) -> None:
    # Each term alone with every pooling: chunks hold rows that are folded already.
    kind = "diag" if which == "both" else "blocks"
    tensors = problem((7, 9), (5, 6), 3, 8, kind, device=device)
    masks = {"region_mask": mask(7, 5, device), "word_mask": mask(9, 6, device)}
    if which != "both":
        masks = {which: masks[which]}
    check("late_interaction", tensors, pooling=pooling, sharpness=3.0, normalize=True, backend=backend, **masks)


@poolings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, pooling: str, backend: str, device: str) -> None:
    """Weights stay float32 beside half-precision features, whose best regions are those of the exact similarities."""
    tensors = problem((3, 5), (7, 6), 2, 16, dtype=dtype, device=device)
    check(
        "late_interaction", tensors, pooling=pooling, sharpness=2.0, normalize=True, backend=backend,
        region_mask=mask(3, 7, device), word_mask=mask(5, 6, device),
    )  # fmt: skip


@pytest.mark.parametrize("wanted", ["regions", "words", "W_diag", "W_blocks"])
def test_each_gradient_alone(wanted: str, backend: str, device: str) -> None:
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    for name, x in tensors.items():
        x.requires_grad_(name == wanted)
    check("late_interaction", tensors, normalize=True, backend=backend)


@poolings
@normalizes
def test_gradcheck(pooling: str, normalize: bool, device: str) -> None:
    tensors = problem((2, 3), (4, 3), 2, 3, dtype=torch.float64, device=device)
    masks = {"region_mask": mask(2, 4, device), "word_mask": mask(3, 3, device)}

    def call(*leaves: Tensor) -> Tensor:
        return gssf_triton.late_interaction(
            *leaves, **masks, pooling=pooling, sharpness=3.0, normalize=normalize, backend="torch"
        )

    assert torch.autograd.gradcheck(call, tuple(tensors.values()))


@poolings
def test_any_strides(pooling: str, backend: str, device: str) -> None:
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    plain = gssf_triton.late_interaction(**tensors, pooling=pooling, backend=backend)
    strided = dict(tensors)
    strided["regions"] = features(48, 5, 6, device=device)[::2].permute(2, 1, 0)[::2]
    strided["words"] = features(6, 4, 24, device=device).transpose(0, 1)
    assert not any(strided[name].is_contiguous() for name in ("regions", "words"))
    with torch.no_grad():
        for name in ("regions", "words"):
            strided[name].copy_(tensors[name])
    assert torch.equal(gssf_triton.late_interaction(**strided, pooling=pooling, backend=backend), plain)


@poolings
def test_padding_reaches_nothing(pooling: str, backend: str, device: str) -> None:
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
        scores = gssf_triton.late_interaction(**leaves, **masks, pooling=pooling, normalize=True, backend=backend)
        grads = torch.autograd.grad(scores, list(leaves.values()), incoming)
        results.append([scores.detach(), *grads])
        assert not grads[0][~masks["region_mask"]].any() and not grads[1][~masks["word_mask"]].any()
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_close(ours, first, tolerance(torch.float32))


def test_negative_similarities_beat_padding(backend: str, device: str) -> None:
    """A word whose valid regions are all below 0 takes the best of them, not padding's 0."""
    regions = torch.tensor([[[-1.0], [-2.0], [0.0]]], device=device)
    words = torch.ones(1, 1, 1, device=device)
    valid = torch.tensor([[True, True, False]], device=device)
    metric = torch.ones(1, device=device)
    score = gssf_triton.late_interaction(regions, words, metric, region_mask=valid, backend=backend)
    assert score.item() == -1.0


@poolings
def test_fully_masked_items_score_zero(pooling: str, backend: str, device: str) -> None:
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    region_mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    word_mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    region_mask[1], word_mask[2] = False, False
    scores = gssf_triton.late_interaction(
        **tensors, region_mask=region_mask, word_mask=word_mask, pooling=pooling, backend=backend
    )
    zero = torch.zeros_like(scores, dtype=torch.bool)
    zero[1], zero[:, 2] = True, True
    assert torch.equal(scores == 0, zero)
    d_regions, d_words = torch.autograd.grad(scores.sum(), [tensors["regions"], tensors["words"]])
    assert not d_regions[1].any() and not d_words[2].any()
    assert d_regions[0].any() and d_words[0].any()


def test_integer_masks(backend: str, device: str) -> None:
    """Tokenizers give 0 and 1."""
    tensors = problem((3, 4), (5, 6), 3, 8, device=device)
    valid = mask(4, 6, device)
    as_bool = gssf_triton.late_interaction(**tensors, word_mask=valid, backend=backend)
    assert torch.equal(gssf_triton.late_interaction(**tensors, word_mask=valid.long(), backend=backend), as_bool)


@poolings
@pytest.mark.parametrize(
    ("regions", "words"),
    [((0, 4, 8), (3, 5, 8)), ((2, 4, 8), (0, 5, 8)), ((2, 0, 8), (3, 5, 8)), ((2, 4, 8), (3, 0, 8))],
    ids=["no-image", "no-caption", "no-region", "no-word"],
)
def test_empty(regions: tuple[int, ...], words: tuple[int, ...], pooling: str, backend: str, device: str) -> None:
    leaves = [features(*shape, device=device).requires_grad_() for shape in (regions, words)]
    leaves += [torch.ones(8, device=device, requires_grad=True), torch.ones(2, 4, 4, device=device, requires_grad=True)]
    scores = gssf_triton.late_interaction(*leaves, pooling=pooling, normalize=True, backend=backend)
    assert torch.equal(scores.detach(), torch.zeros(regions[0], words[0], device=device))
    for x, grad in zip(leaves, torch.autograd.grad(scores.sum(), leaves), strict=True):
        assert grad.shape == x.shape and not grad.any()


@poolings
def test_no_channel(pooling: str, backend: str, device: str) -> None:
    regions, words = torch.zeros(2, 3, 0, device=device), torch.zeros(4, 5, 0, device=device)
    W_diag = torch.zeros(0, device=device, requires_grad=True)
    scores = gssf_triton.late_interaction(regions, words, W_diag, pooling=pooling, backend=backend)
    expected = torch.tensor(3.0).log() if pooling == "lse-mean" else torch.zeros(())
    torch.testing.assert_close(scores, expected.to(device).expand(2, 4))
    (grad,) = torch.autograd.grad(scores.sum(), W_diag)
    assert grad.shape == (0,)


@pytest.mark.parametrize("pooling", ["max-mean", "max-sum"])
def test_of_equal_regions_the_lowest_gets_the_gradient(pooling: str, backend: str, device: str) -> None:
    # Small integers: equal regions' similarities are equal to the last bit, wherever a product sums them.
    regions = features(2, 1, 8, device=device).round().repeat(1, 40, 1).requires_grad_()
    words = features(3, 4, 8, device=device).round()
    valid = torch.ones(2, 40, dtype=torch.bool, device=device)
    valid[1, :3] = False
    scores = gssf_triton.late_interaction(
        regions, words, torch.ones(8, device=device), region_mask=valid, pooling=pooling, backend=backend
    )
    (grad,) = torch.autograd.grad(scores.sum(), regions)
    assert grad[0].any(1).nonzero().flatten().tolist() == [0]
    assert grad[1].any(1).nonzero().flatten().tolist() == [3]


@poolings
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_pairs(poison: float, pooling: str, backend: str, device: str) -> None:
    tensors = {name: x.detach() for name, x in problem((5, 6), (4, 3), 2, 8, device=device).items()}
    options = {"pooling": pooling, "backend": backend}
    clean = gssf_triton.late_interaction(**tensors, **options)
    tensors["regions"][2, 1, 3] = poison
    tensors["words"][4, 2, 5] = poison
    scores = gssf_triton.late_interaction(**tensors, **options)
    bad = torch.zeros_like(scores, dtype=torch.bool)
    bad[2], bad[:, 4] = True, True
    assert_close(scores[~bad], clean[~bad], tolerance(torch.float32))
    if poison != poison:
        assert scores[bad].isnan().all()


def test_sharper_is_closer_to_the_maximum(backend: str, device: str) -> None:
    """And neither a sharp nor a wide range of similarities overflows."""
    tensors = {name: x.detach() for name, x in problem((3, 4), (5, 6), 3, 8, device=device).items()}
    best = gssf_triton.late_interaction(**tensors, backend=backend)
    last = torch.full_like(best, torch.inf)
    for sharpness in (0.1, 1.0, 10.0, 1000.0):
        smooth = gssf_triton.late_interaction(**tensors, pooling="lse-mean", sharpness=sharpness, backend=backend)
        assert (smooth <= last + 1e-4).all() and (smooth >= best - 1e-4).all()
        last = smooth
    assert_close(last, best, 1e-3)


@pytest.mark.parametrize("others", [(1, 2), (4, 5)], ids=["fewer", "more"])
@pytest.mark.parametrize("function", ["late_interaction", "cross_attention_sim"])
def test_rows_past_two_to_the_31_elements(
    function: str, others: tuple[int, int], backend: str, device: str, tmp_path: Path
) -> None:
    """Regions or words far apart, beside fewer rows, which are folded then, and beside more: folding copies."""
    far = far_apart(3, 24, device, tmp_path)[None]
    near, W = far.clone(memory_format=torch.contiguous_format), {"W_diag": torch.randn(24, device=device).half()}
    other = features(*others, 24, dtype=torch.float16, device=device)
    score = getattr(gssf_triton, function)
    assert torch.equal(score(far, other, **W, backend=backend), score(near, other, **W, backend=backend))
    assert torch.equal(score(other, far, **W, backend=backend), score(other, near, **W, backend=backend))


@poolings
def test_same_call_same_bits(pooling: str, backend: str, device: str, small_chunks: None) -> None:
    tensors = problem((5, 7), (6, 5), 3, 8, dtype=torch.bfloat16, device=device)
    masks = {"region_mask": mask(5, 6, device), "word_mask": mask(7, 5, device)}
    incoming = torch.randn(5, 7, device=device)

    def run() -> list[Tensor]:
        scores = gssf_triton.late_interaction(**tensors, **masks, pooling=pooling, normalize=True, backend=backend)
        return [scores.detach(), *torch.autograd.grad(scores, list(tensors.values()), incoming.to(scores.dtype))]

    for now, before in zip(run(), run(), strict=True):
        assert torch.equal(now, before)


def test_only_valid_rows_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is not computed on the CPU: rows loaded for the product, of captions of 1 … 8 words in 512 slots."""
    loaded = []
    load = packing.Packing.load

    def spy(self: packing.Packing, x: Tensor, batch: packing.Batch, dtype: torch.dtype) -> Tensor:
        rows = load(self, x, batch, dtype)
        loaded.append(rows.shape[:2].numel())
        return rows

    monkeypatch.setattr(packing.Packing, "load", spy)
    lengths = torch.arange(64) % 9
    valid = torch.rand(64, 512).argsort(1) < lengths[:, None]
    words, regions = features(64, 512, 8), features(1, 1, 8)
    gssf_triton.late_interaction(regions, words, torch.ones(8), word_mask=valid, backend="torch")
    assert sum(loaded) <= 1 + 64 * 8


HELD = [("late_interaction", {"pooling": pooling}) for pooling in POOLINGS] + [("cross_attention_sim", {})]


@pytest.mark.parametrize(("function", "options"), HELD, ids=[*POOLINGS, "attention"])
def test_regions_times_words_are_never_held(
    function: str, options: dict[str, str], backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in forward, nor in backward, of any pooling: no operator returns more than a part of them."""
    monkeypatch.setattr(pairs, "CHUNK_BYTES", {"cpu": 4096, "cuda": 4096})
    tensors = problem((12, 14), (9, 8), 1, 8, device=device)
    with Largest() as largest:
        scores = getattr(gssf_triton, function)(**tensors, normalize=True, backend=backend, **options)
        torch.autograd.grad(scores.sum(), list(tensors.values()))
    assert 0 < largest.bytes < 12 * 14 * 9 * 8 * 4 // 4


def test_second_derivatives_are_refused(backend: str, device: str) -> None:
    tensors = problem((2, 3), (4, 5), 2, 4, device=device)
    scores = gssf_triton.late_interaction(**tensors, backend=backend)
    (grad,) = torch.autograd.grad(scores.sum(), tensors["words"], create_graph=True)
    with pytest.raises(RuntimeError, match="late_interaction is differentiable once"):
        grad.sum().backward()
