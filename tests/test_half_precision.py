"""Half precision against float64: what autocast rounds and what it does not, and float16's range."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import reference
from support.reference import assert_close, check, features, tolerance, weights
from support.region_word_reference import REFERENCES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gssf_triton
from gssf_triton import precision, viz
from gssf_triton.integrations import arrays
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.plans import PLANS
from gssf_triton.similarity import torch_backend

HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
kinds = pytest.mark.parametrize("kind", ["diag", "blocks", "diag+blocks"])


def wide(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.detach().double() for name, x in tensors.items()}


def gradients(out: Tensor, incoming: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, incoming.to(out.dtype)))


# ---------------------------------------------------------------- autocast


@halves
@pytest.mark.parametrize("size", [1e5, 1e-8])
def test_cosine_under_autocast_has_no_scale(size: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """float32 rows are normalised as they came, not after a cast that overflows, or leaves nothing of them."""
    a, b = features(6, 32, device=device) * size, features(6, 32, device=device) * size
    metric = weights("diag+blocks", 4, 8, device=device)
    expected = reference.pairwise_sim(**wide({"a": a, "b": b, **metric}), normalize=True)
    options: dict[str, Any] = {"normalize": True, "backend": backend}
    with torch.autocast(device, dtype):
        S = gssf_triton.pairwise_sim(a, b, **metric, **options)
        diagonal = gssf_triton.paired_sim(a, b, **metric, **options)
        terms = gssf_triton.pairwise_terms(a, b, **metric, **options)
        folded = gssf_triton.transform(a, **metric, **options)
        late = gssf_triton.late_interaction(a.view(2, 3, 32), b.view(3, 2, 32), **metric, **options)
        attended = gssf_triton.cross_attention_sim(a.view(2, 3, 32), b.view(3, 2, 32), **metric, backend=backend)
        loss = gssf_triton.info_nce(a, b, **metric, logit_scale=10.0, **options)
    assert {x.dtype for x in (S, diagonal, *terms, folded, late, attended)} == {dtype} and loss.dtype == torch.float32
    tol = tolerance(dtype)
    assert_close(S, expected, tol)
    typical = expected.abs().mean()
    assert_close(diagonal, expected.diagonal(), tol, size=typical.expand(6))
    assert_close(terms[0] + terms[1], expected, 2 * tol)
    assert_close(folded, reference.transform(**wide({"x": a, **metric}), normalize=True), tol)
    known = wide({"regions": a.view(2, 3, 32), "words": b.view(3, 2, 32), **metric})
    assert_close(late, REFERENCES["late_interaction"](**known, normalize=True), tol, size=typical.expand(2, 3))
    assert_close(attended, REFERENCES["cross_attention_sim"](**known), 2 * tol, size=typical.expand(2, 3))
    logits, target = 10 * expected, torch.arange(6, device=device)
    exact = sum(torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)) / 2
    assert_close(loss, exact, tol)


LOSSES: dict[str, dict[str, Any]] = {
    "info_nce": {"logit_scale": 100.0},
    "sigmoid_loss": {"logit_scale": 100.0, "logit_bias": -50.0},
    "triplet_loss": {"hardest": False, "margin": 10.0},  # so that rounding decides of no hinge whether it is active
    "distillation_loss": {"logit_scale": 20.0},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_losses_under_autocast(loss: str, backend: str, device: str) -> None:
    """The weights are not rounded, nor is T(a) but to the product's operands: within the contract's 6e-3."""
    N, D, B = 48, 32, 8
    a = features(N, D, device=device)
    b = a + 2 * features(N, D, device=device)
    tensors = {"a": a, "b": b, **weights("diag+blocks", D // B, B, device=device)}
    options = dict(LOSSES[loss])
    if loss == "distillation_loss":
        options |= {"teacher_a": features(N, D, device=device), "teacher_b": features(N, D, device=device)}

    def run(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        fixed = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
        chosen = "torch" if dtype == torch.float64 else backend
        with torch.autocast(device, torch.bfloat16) if autocast else nullcontext():
            value = getattr(gssf_triton, loss)(**leaves, **fixed, normalize=True, backend=chosen)
        return [value, *gradients(value, torch.ones_like(value), list(leaves.values()))]

    for ours, exact in zip(run(torch.float32, True), run(torch.float64, False), strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, exact, tolerance(torch.bfloat16) / 2)


@kinds
def test_gradients_of_similarities_under_autocast(kind: str, backend: str, device: str) -> None:
    """Weights near the identity, of which bfloat16 would lose what was learned."""
    metric = {name: w * 1e-2 for name, w in weights(kind, 4, 16, device=device).items() if w is not None}
    if "W_diag" in metric:
        metric["W_diag"] = 1 + metric["W_diag"]
    tensors = {"a": features(30, 64, device=device), "b": features(50, 64, device=device), **metric}
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    for out_dtype in (torch.bfloat16, torch.float32):
        with torch.autocast(device, torch.bfloat16):
            S = gssf_triton.pairwise_sim(**tensors, normalize=True, out_dtype=out_dtype, backend=backend)
        expected = reference.pairwise_sim(**exact, normalize=True)
        incoming = features(30, 50, device=device)
        assert S.dtype == out_dtype
        assert_close(S, expected, tolerance(torch.bfloat16))
        found, known = (gradients(x, incoming, list(y.values())) for x, y in ((S, tensors), (expected, exact)))
        for name, ours, theirs in zip(tensors, found, known, strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours, theirs, tolerance(torch.bfloat16), name=f"d{name} of {out_dtype}")


def test_what_was_learned_survives_autocast(backend: str, device: str) -> None:
    """Matched pairs are no half-precision product: float32 weights that bfloat16 cannot tell from 1 are told."""
    x = torch.ones(3, 8, device=device)
    W_diag = torch.full((8,), 1 + 2.0**-12, device=device)
    with torch.autocast(device, torch.bfloat16):
        s = gssf_triton.paired_sim(x, x, W_diag, out_dtype=torch.float32, backend=backend)
        late = gssf_triton.late_interaction(x[None], x[None], W_diag, out_dtype=torch.float32, backend="torch")
    assert torch.equal(s, torch.full((3,), 8 + 2.0**-9, device=device))
    assert late.item() == 8 + 2.0**-9


def test_retrieval_and_metrics_do_not_look_at_autocast(backend: str, device: str) -> None:
    """Ranking scores that were rounded to bfloat16 would make ties of scores that differ."""
    queries, gallery = features(5, 32, device=device), features(200, 32, device=device)
    metric = weights("diag+blocks", 4, 8, device=device)
    ids = torch.arange(200, device=device) // 3
    images, texts = ({"image_ids": ids[:12], "text_ids": ids[:12]}, gallery[:12] + queries[0])

    def answers() -> list[Any]:
        search = gssf_triton.topk(queries, gallery, **metric, k=50, normalize=True, backend=backend)
        ranks = gssf_triton.ranks(
            queries, gallery, **metric, query_ids=ids[:5], gallery_ids=ids, normalize=True, backend=backend
        )
        return [
            *search, ranks,
            gssf_triton.metrics.retrieval(gallery[:12], ids[:12], **metric, backend=backend),
            gssf_triton.metrics.image_text(gallery[:12], texts, **metric, **images, backend=backend),
        ]  # fmt: skip

    plain = answers()
    with torch.autocast(device, torch.bfloat16):
        cast = answers()
    expected = reference.pairwise_sim(**wide({"a": queries, "b": gallery, **metric}), normalize=True)
    assert_close(cast[0], expected.topk(50).values, tolerance(torch.float32))
    for x, y in zip(cast, plain, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


def test_arrays_and_parts_do_not_look_at_autocast() -> None:
    """What leaves for an index, and what a figure shows."""
    a, b, metric = features(5, 64), features(5, 64), weights("diag+blocks", 4, 16)

    def answers() -> list[Any]:
        parts = viz.score_parts(a, b, **metric)
        histogram = viz.similarity_histogram(a, b, **metric)
        folded = arrays.folded_queries(a, **metric, normalize=True)
        return [folded, parts.channels, parts.score, histogram.edges, histogram.positives, histogram.negatives]

    plain = answers()
    with torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(answers(), plain, strict=True):
            assert (x == y).all()


def test_merged_attention_does_not_look_at_autocast() -> None:
    layer = gssf_triton.nn.GSSFAttention(32, 4)
    for weight in (layer.W_diag, layer.W_blocks):
        torch.nn.init.normal_(weight)
    plain = layer.merged().in_proj_weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merged().in_proj_weight, plain)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_towers_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], backend: str, device: str) -> None:
    """Under autocast they meet; outside they are an error."""
    a, b = (features(6, 16, device=device).to(dtype) for dtype in dtypes)
    W_diag = torch.rand(16, device=device) + 0.5
    expected = reference.pairwise_sim(a.double(), b.double(), W_diag.double())
    with torch.autocast(device, torch.bfloat16):
        S = gssf_triton.pairwise_sim(a, b, W_diag, backend=backend)
        late = gssf_triton.late_interaction(a[None], b[None], W_diag, pooling="max-sum", backend=backend)
    assert_close(S, expected, tolerance(torch.bfloat16))
    assert_close(late[0, 0], expected.amax(0).sum(), tolerance(torch.bfloat16))
    with pytest.raises(ValueError, match="same dtype"):
        gssf_triton.pairwise_sim(a, b, W_diag, backend=backend)


# ---------------------------------------------------------------- float16's range

#: Sizes of (a, b, W) whose scores float16 holds, and T(a) = a W does not: too large, or nothing left of it.
RANGES = {
    "large": (300.0, 1e-3, 400.0),
    "far": (1e3, 1e-6, 1e5),
    "small": (1e-3, 1e4, 1e-5),
    "tiny": (1e-2, 2e4, 1e-7),
}


def in_float16(sizes: str, kind: str, device: str) -> dict[str, Tensor]:
    of_a, of_b, of_w = RANGES[sizes]
    a, b = (features(n, 64, device=device).clamp(-3, 3) * size for n, size in ((6, of_a), (9, of_b)))
    metric = {name: (w.abs() + 0.1) * of_w for name, w in weights(kind, 4, 16, device=device).items() if w is not None}
    return {"a": a.half(), "b": b.half(), **metric}


@kinds
@pytest.mark.parametrize("sizes", RANGES)
def test_a_fold_beyond_float16(sizes: str, kind: str, backend: str, device: str) -> None:
    tensors = {name: x.requires_grad_() for name, x in in_float16(sizes, kind, device).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected = reference.pairwise_sim(**exact)
    incoming = features(6, 9, device=device).half()
    tol = tolerance(torch.float16)
    known = gradients(expected, incoming, list(exact.values()))
    for out_dtype in (torch.float16, torch.float32):
        S = gssf_triton.pairwise_sim(**tensors, out_dtype=out_dtype, backend=backend)
        assert S.dtype == out_dtype
        assert_close(S, expected, tol, name=f"S in {out_dtype}")
        for name, ours, theirs in zip(tensors, gradients(S, incoming, list(tensors.values())), known, strict=True):
            if theirs.abs().max() < torch.finfo(torch.float16).max and theirs.abs().max() > 1e-2:
                assert_close(ours, theirs, tol, name=f"d{name} of {out_dtype}")
    a, b = tensors.pop("a"), tensors.pop("b")
    fixed = {name: x.detach() for name, x in tensors.items()}
    as_float: dict[str, Any] = {"out_dtype": torch.float32, "backend": backend}
    s = gssf_triton.paired_sim(a, b[:6], **fixed, **as_float)
    assert_close(s, expected[:, :6].diagonal(), tol, name="paired_sim", size=expected[:, :6].detach().abs().mean(1))
    if len(fixed) == 2:
        terms = gssf_triton.pairwise_terms(a, b, **fixed, **as_float)
        apart = reference.pairwise_terms(**{name: x.detach() for name, x in exact.items()})
        for ours, theirs in zip(terms, apart, strict=True):
            assert_close(ours, theirs, tol, name="a term")
    values, indices = gssf_triton.topk(a.detach(), b.detach(), **fixed, k=9, backend=backend)
    assert_close(values, expected.sort(dim=1, descending=True).values, tol, name="topk")
    assert_close(values, expected.gather(1, indices), tol, name="topk's indices")
    late = gssf_triton.late_interaction(a.view(2, 3, 64), b.view(3, 3, 64), **fixed, **as_float)
    by_image = expected.view(2, 3, 3, 3).amax(1).mean(-1)
    assert_close(late, by_image, tol, name="late_interaction")


@pytest.mark.parametrize("pooling", ["max-mean", "lse-mean"])
def test_gradients_of_late_interaction_beyond_float16(pooling: str, backend: str, device: str) -> None:
    of = in_float16("large", "diag+blocks", device)
    leaves = {"regions": of.pop("a").view(2, 3, 64), "words": of.pop("b").view(3, 3, 64), **of}
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    options: dict[str, Any] = {"pooling": pooling, "sharpness": 0.01}
    scores = gssf_triton.late_interaction(**leaves, **options, backend=backend)
    expected = REFERENCES["late_interaction"](**exact, **options)
    assert_close(scores, expected, tolerance(torch.float16))
    incoming = torch.rand(2, 3, device=device).half() / 10
    found, known = (gradients(x, incoming, list(y.values())) for x, y in ((scores, leaves), (expected, exact)))
    for name, ours, theirs in zip(leaves, found, known, strict=True):
        assert_close(ours, theirs, tolerance(torch.float16), name=f"d{name}")


def test_weights_beyond_float16(backend: str, device: str) -> None:
    """T(x) fits, the weights would not."""
    x = (features(6, 64, device=device) * 1e-3).half()
    W_blocks = torch.randn(4, 16, 16, device=device) * 1e6
    expected = reference.transform(x.double(), None, W_blocks.double())
    assert_close(gssf_triton.transform(x, None, W_blocks, backend=backend), expected, tolerance(torch.float16))


def test_one_query_far_larger_than_another(backend: str, device: str) -> None:
    """A power of two a query: the small one keeps its bits."""
    queries, gallery = features(2, 64, device=device), features(50, 64, device=device)
    queries, gallery = (queries * torch.tensor([[6e3], [2e-4]], device=device)).half(), gallery.half()
    W_diag = torch.full((64,), 30.0, device=device)
    expected = (queries.double() * 30) @ gallery.double().T
    values, indices = gssf_triton.topk(queries, gallery, W_diag, k=50, backend=backend)
    for row in (0, 1):
        assert_close(values[row], expected[row].sort(descending=True).values, tolerance(torch.float16))
        assert_close(values[row], expected[row][indices[row]], tolerance(torch.float16))


def test_cross_attention_beyond_float16(backend: str, device: str) -> None:
    """Unit rows under weights of 10⁶, scores rounded to float32."""
    regions, words = features(2, 5, 64, device=device).half(), features(3, 7, 64, device=device).half()
    W_diag = (torch.rand(64, device=device) + 0.5) * 1e6
    out = gssf_triton.cross_attention_sim(regions, words, W_diag, out_dtype=torch.float32, backend=backend)
    expected = REFERENCES["cross_attention_sim"](regions.double(), words.double(), W_diag.double())
    assert_close(out, expected, 2 * tolerance(torch.float16))


def test_attention_beyond_float16(backend: str, device: str) -> None:
    """T(q) of 10⁵ and keys of 10⁻³."""
    q, k, v = (features(1, 2, 5, 32, device=device) for _ in range(3))
    q, k = (q * 100).half(), (k * 1e-4).half()
    W_diag = (torch.rand(2, 32, device=device) + 0.5) * 1e3
    out = gssf_triton.attention(q, k, v.half(), W_diag, backend=backend)
    logits = (q.double() * W_diag.double()[:, None]) @ k.double().mT / 32**0.5
    assert_close(out, logits.softmax(-1) @ v.half().double(), 2 * tolerance(torch.float16))


@pytest.mark.parametrize(
    ("t", "y", "unit"),
    [
        (1.0, 1.0, 1.0),
        (2.0**-8, 2.0**14, 1.0),
        (2.0**17, 1.0, 2.0**3),
        (2.0**-20, 64.0, 2.0**-12),
        (2.0**40, 2.0**-20, 2.0**26),
        (1.0, 2.0**16, 2.0**-2),
        (1.0, 0.0, 2.0**8),
        (0.0, 1.0, 2.0**-118),
    ],
)
def test_the_power_that_is_moved(t: float, y: float, unit: float) -> None:
    """The least that brings t into [2⁻⁸, 2¹⁵), and then y: none where both are there; NaN and Inf say nothing."""
    rows = torch.tensor([[t, float("inf")], [float("nan"), -t / 2]])
    others = torch.tensor([[-y, 0.0]])
    assert precision.moved_unit(rows, others).item() == unit


@pytest.mark.parametrize("sizes", RANGES)
def test_operands_in_float16_have_the_product(sizes: str) -> None:
    """As a GPU multiplies them; and gradients pass."""
    tensors = in_float16(sizes, "diag", "cpu")
    t = tensors["a"].float() * tensors["W_diag"]
    leaves = [t.requires_grad_(), tensors["b"].requires_grad_()]
    left, right = precision.float16_operands(*leaves)
    assert left.dtype == right.dtype == torch.float16
    exact = [x.detach().double().requires_grad_() for x in leaves]
    S, expected = left @ right.mT, exact[0] @ exact[1].mT
    assert_close(S, expected, tolerance(torch.float16))
    incoming = torch.randn(6, 9).half()
    pairs = zip(gradients(S, incoming, leaves), gradients(expected, incoming, exact), strict=True)
    for ours, theirs in pairs:
        if 1e-2 < theirs.abs().max() < 6e4 or ours.dtype == torch.float32:
            assert_close(ours, theirs, tolerance(torch.float16))


@pytest.mark.parametrize(("of_b", "rows", "of_grad"), [(200.0, 512, 1.0), (0.01, 32, 1e-4)], ids=["large", "small"])
def test_gradients_beyond_float16(of_b: float, rows: int, of_grad: float, backend: str, device: str) -> None:
    """dS b on its way to the gradients is in float32: it leaves float16's range, or its digits, where they do not."""
    a, b = features(8, 64, device=device).half(), (features(rows, 64, device=device).abs() * of_b).half()
    W_diag = torch.full((64,), 0.01, device=device)
    exact = [x.double().requires_grad_() for x in (a, b, W_diag)]
    incoming = torch.full((8, rows), of_grad, device=device)
    known = torch.autograd.grad((exact[0] * exact[2]) @ exact[1].T, exact, incoming.double())
    leaves = [x.clone().requires_grad_() for x in (a, b, W_diag)]
    for out_dtype in (torch.float32, torch.float16):
        S = gssf_triton.pairwise_sim(*leaves, out_dtype=out_dtype, backend=backend)
        for plan in PLANS:
            with force_plan(plan):
                found = torch.autograd.grad(S, leaves, incoming.to(out_dtype), retain_graph=True)
            for name, ours, theirs in zip(("a", "b", "W_diag"), found, known, strict=True):
                if theirs.abs().max() > 1e-4 or ours.dtype == torch.float32:  # below it float16 itself has no digits
                    assert_close(ours, theirs, tolerance(torch.float16), name=f"d{name} of {out_dtype}, {plan}")


@halves
def test_cross_attention_does_not_look_at_autocast(dtype: torch.dtype, backend: str, device: str) -> None:
    """Its attention is no product: rounded rows would turn it around where they meet no word well."""
    regions, words = (features(*shape, 64, device=device).requires_grad_() for shape in ((4, 6), (5, 4)))
    W_diag = (torch.rand(64, device=device) + 0.5).requires_grad_()
    leaves = [regions, words, W_diag]
    plain = gssf_triton.cross_attention_sim(*leaves, backend=backend)
    with torch.autocast(device, dtype):
        found = gssf_triton.cross_attention_sim(*leaves, backend=backend)
    assert found.dtype == dtype and torch.equal(found, plain.to(dtype))
    pairs = zip(torch.autograd.grad(found.float().sum(), leaves), torch.autograd.grad(plain.sum(), leaves), strict=True)
    for ours, expected in pairs:
        assert_close(ours, expected, tolerance(torch.float32))


class _Products(TorchDispatchMode):
    """Records the dtypes of products' operands."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.dtypes |= {x.dtype for x in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("slow", [True, False])
def test_a_cpu_that_multiplies_bfloat16_slowly_multiplies_float32(
    slow: bool, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "SLOW_ON_CPU", frozenset((torch.bfloat16,) if slow else ()))
    tensors = {"a": features(33, 64, dtype=torch.bfloat16), "b": features(20, 64, dtype=torch.bfloat16)}
    tensors |= weights("diag+blocks", 4, 16, torch.bfloat16)
    for x in tensors.values():
        x.requires_grad_()
    with _Products() as products:
        (S,) = check("pairwise_sim", tensors, normalize=normalize, backend="torch")
    assert (torch.bfloat16 in products.dtypes) is not slow
    if slow:  # only S itself is rounded
        wide = {name: x.detach().double() for name, x in tensors.items()}
        assert_close(S, reference.pairwise_sim(**wide, normalize=normalize), 2.0**-9)
