"""Every loss and every gradient against float64 with the whole matrix stored, in chunks small enough to need many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.losses_problem import LOSSES, problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gssf_triton
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.stream_values import Operands
from gssf_triton.streaming.driver import stream, stream_op

losses = pytest.mark.parametrize("loss", LOSSES)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Ragged chunks of several tiles, so that states are merged every way there is."""
    with choice.use(chunk=ChunkConfig(37, 45)):
        yield


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("info_nce", {}),
    ("info_nce", {"symmetric": False}),
    ("info_nce", {"label_smoothing": 0.1}),
    ("info_nce", {"label_smoothing": 0.1, "symmetric": False}),
    ("sigmoid_loss", {}),
    ("triplet_loss", {"margin": 0.3}),
    ("triplet_loss", {"hardest": False}),
    ("distillation_loss", {}),
]


#: Every variant with every reduction, half of them with equal ids and unit rows: each variant, and each reduction, with
#: and without. The losses make one value a row whatever becomes of it.
CASES = [
    pytest.param(
        loss, options, reduction, bool((row + column) % 2),
        id="-".join((loss, *options, reduction, *(("ids", "normalize") if (row + column) % 2 else ()))),
    )
    for row, (loss, options) in enumerate(VARIANTS)
    for column, reduction in enumerate(("mean", "sum", "none"))
]  # fmt: skip


@pytest.mark.parametrize(("loss", "options", "reduction", "more"), CASES)
def test_value_and_gradients(
    loss: str, options: dict[str, Any], reduction: str, more: bool, backend: str, device: str
) -> None:
    ids = more and loss != "distillation_loss"  # which takes none
    problem(loss, 53, ids=ids, reduction=reduction, normalize=more, device=device, **options).check(backend, factor=3)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "distillation_loss"])
def test_ids_of_any_strides(loss: str, backend: str, device: str) -> None:
    """Every other one of a list, and one for all: read where they lie, not one after the other."""
    p = problem(loss, 53, device=device)
    for ids in (torch.randint(0, 9, (53, 2), device=device)[:, 0], torch.zeros(1, device=device).long().expand(53)):
        p.fixed["ids"] = ids
        strided = p.call(backend)
        p.fixed["ids"] = ids.contiguous()
        assert strided.equal(p.call(backend))
        assert p.fixed["ids"].equal(ids)


@losses
@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
def test_dtypes(loss: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Half-precision features with float32 weights: every gradient in its tensor's dtype, the loss in float32.

    The hinge of half-precision operands may take another of two negatives that are equal but for rounding; its values
    are held to the reference, its gradients in the other dtypes.
    """
    p = problem(loss, 41, dtype=dtype, normalize=True, device=device)
    if loss == "triplet_loss" and dtype in HALF:
        expected, _ = p.exact()
        torch.testing.assert_close(p.call(backend).double().cpu(), expected.detach(), rtol=2e-3, atol=2e-3)
        return
    p.check(backend, factor=3)


@losses
@pytest.mark.parametrize("kind", ["diag", "blocks"])
def test_either_weight_alone(loss: str, kind: str, backend: str, device: str) -> None:
    problem(loss, 40, kind=kind, device=device).check(backend, factor=3)


@given(data=st.data())
def test_any_size(data: st.DataObject, backend: str, device: str) -> None:
    loss = data.draw(st.sampled_from(LOSSES))
    N = data.draw(st.sampled_from([1, 2, 31, 33, 46]))
    G, B = data.draw(st.sampled_from([(1, 1), (5, 4), (2, 8), (3, 7), (1, 33)]))
    ids = data.draw(st.booleans()) and loss != "distillation_loss"
    # On the sphere of one dimension, two points, every gradient is 0 and only its rounding could be compared.
    normalize = G * B > 1 and data.draw(st.booleans())
    problem(loss, N, G=G, B=B, ids=ids, normalize=normalize, device=device).check(backend, factor=4)


@losses
def test_gradcheck(loss: str, backend: str, device: str) -> None:
    """Finite differences, which share nothing with either implementation."""
    p = problem(loss, 6, G=2, B=3, dtype=torch.float64, normalize=True, ids=loss != "distillation_loss", device=device)
    if loss == "distillation_loss":
        # It also moves the teacher's distribution, which is a constant to the gradient.
        p.fixed["logit_scale"] = p.leaves.pop("logit_scale").detach()
    names = list(p.leaves)

    def call(*tensors: Tensor) -> Tensor:
        p.leaves = dict(zip(names, tensors, strict=True))
        return p.call(backend)

    leaves = tuple(p.leaves.values())
    # Random directions in place of every entry where a call takes the interpreter a tenth of a second. The mean's
    # gradients there are held to float64 by `test_value_and_gradients`.
    fast = backend == "triton" and device == "cpu"
    p.options["reduction"] = "none"
    assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, fast_mode=fast)
    if not fast:
        p.options["reduction"] = "mean"
        assert torch.autograd.gradcheck(call, leaves, eps=1e-6, atol=1e-6, fast_mode=True)


@losses
def test_only_what_is_asked_for(loss: str, backend: str, device: str) -> None:
    """Each leaf alone, and a call that needs no gradient at all."""
    p = problem(loss, 12, device=device)
    everything = torch.autograd.grad(p.call(backend), list(p.leaves.values()))
    for wanted, expected in zip(list(p.leaves), everything, strict=True):
        for name, x in p.leaves.items():
            x.requires_grad_(name == wanted)
        (found,) = torch.autograd.grad(p.call(backend), [p.leaves[wanted]])
        torch.testing.assert_close(found, expected)
    for x in p.leaves.values():
        x.requires_grad_(False)
    assert not p.call(backend).requires_grad


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "triplet_loss"])
def test_the_scale_s_gradient_is_that_of_the_features(loss: str, backend: str, device: str) -> None:
    """logit_scale and a both multiply S, so τ·dτ = Σ ⟨aᵢ, daᵢ⟩: two results of the kernels that share no sum."""
    p = problem(loss, 50, dtype=torch.float64, ids=loss != "distillation_loss", device=device)
    p.call(backend).backward()
    a, scale = p.leaves["a"], p.leaves["logit_scale"]
    assert a.grad is not None and scale.grad is not None
    torch.testing.assert_close(scale.detach() * scale.grad, (a.detach() * a.grad).sum())


@losses
def test_backward_twice_over_one_graph(loss: str, backend: str, device: str) -> None:
    """What is saved for backward is left as it was."""
    p = problem(loss, 20, device=device)
    out = p.call(backend)
    leaves = list(p.leaves.values())
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@losses
@pytest.mark.parametrize(
    ("reduction", "strict"), [("mean", False), ("none", True)], ids=["mean-default", "none-deterministic"]
)
def test_same_call_same_bits(loss: str, reduction: str, strict: bool, backend: str, device: str) -> None:
    p = problem(loss, 47, ids=loss != "distillation_loss", reduction=reduction, device=device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(strict)
    try:
        runs = []
        # The interpreter has one order only: what differs there differs the second time.
        for _ in range(3 if backend == "torch" or device == "cuda" else 2):
            out = p.call(backend)
            runs.append([out, *torch.autograd.grad(out.sum(), list(p.leaves.values()))])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


@losses
def test_strides(loss: str, backend: str, device: str) -> None:
    """Transposed, expanded and sliced features."""
    p = problem(loss, 24, device=device)
    expected = p.call(backend)
    for name in ("a", "b"):
        x = p.leaves[name].detach()
        p.leaves[name] = torch.stack((x.T, x.T), dim=1)[:, 0].T.requires_grad_()
        assert not p.leaves[name].is_contiguous()
    torch.testing.assert_close(p.call(backend), expected)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("loss", "backend"),
    [*((loss, "torch") for loss in LOSSES),
     *(pytest.param(loss, "triton", marks=pytest.mark.kernels)
       for loss in ("info_nce", "triplet_loss", "distillation_loss"))],
)  # fmt: skip
def test_compiled_equals_eager(loss: str, backend: str, device: str, fresh_compiler: None) -> None:
    """One graph, no break; another batch size compiles at most once more. Both backends are one node of the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda p, b: p.call(b), fullgraph=True, backend=counter)
    for N in (12, 17, 30):
        p = problem(loss, N, device=device)
        leaves = list(p.leaves.values())
        eager = torch.autograd.grad(p.call(backend), leaves)
        ours = torch.autograd.grad(compiled(p, backend), leaves)
        for x, y in zip(ours, eager, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@losses
def test_autocast(loss: str, backend: str, device: str) -> None:
    """Features are cast as a product's operands are; the loss stays float32."""
    p = problem(loss, 24, device=device)
    expected = p.call(backend)
    with torch.autocast(device, torch.bfloat16):
        out = p.call(backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)


def test_opcheck(backend: str, device: str) -> None:
    """The operator's schema, its fake implementation and its behaviour under the compiler's tracing."""
    t, y = (torch.randn(20, 8, device=device) for _ in "ty")
    rows, columns = torch.rand(4, 20, device=device), torch.rand(4, 20, device=device)
    ids, scale = torch.arange(20, device=device) // 2, torch.ones(1, device=device)
    slope = Operands(t, y, scale, rows, columns, ids, ids)
    torch.library.opcheck(stream_op, ("softmax_slope_both", True, False, backend, *slope))
    torch.library.opcheck(stream_op, ("softmax_both", False, False, backend, *Operands(t, y, scale)))
    torch.library.opcheck(stream_op, ("hinge_hardest", False, False, backend, *Operands(t, y, scale)))


@pytest.mark.kernels
def test_backends_agree_on_everything_they_keep(device: str) -> None:
    """State by state: what the kernels merge is what torch merges."""
    from gssf_triton.streaming.epilogues import EPILOGUES

    t, y, *teachers = (torch.randn(61, 12, device=device) / 12**0.25 for _ in range(4))
    ids = torch.randint(0, 20, (61,), device=device)
    scalars = torch.tensor([1.3, -0.2], device=device)
    for name, epilogue in EPILOGUES.items():
        rows, columns = (torch.rand(3 if epilogue.teacher else 4, 61, device=device) for _ in "rc")
        # Logarithms of sums: slopes are below 2, as a loss's are.
        for side in (rows, columns):
            side[: 2 if epilogue.teacher else 1] += 4
        further = (None, None, *teachers) if epilogue.teacher else (ids, ids)
        x = Operands(t, y, scalars, rows, columns, *further)
        both = [stream(name, x, wants_slope=epilogue.slope, backend=backend) for backend in ("torch", "triton")]
        for ours, theirs in zip(*both, strict=True):
            if ours is None or theirs is None:
                assert ours is theirs
                continue
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_modules_hold_the_metric_and_their_scalars(device: str) -> None:
    """A loss module trains the metric, the scale and the bias, and follows the functions."""
    from gssf_triton.nn import GSSF, DistillationLoss, InfoNCELoss, SigmoidLoss, TripletLoss

    metric = GSSF(dim=16, block_size=4).to(device)
    a, b = (torch.randn(9, 16, device=device) for _ in "ab")
    weights = {"W_diag": metric.W_diag, "W_blocks": metric.W_blocks, "normalize": True}
    info_nce = InfoNCELoss(metric, logit_scale=5.0).to(device)
    torch.testing.assert_close(info_nce(a, b), gssf_triton.info_nce(a, b, **weights, logit_scale=5.0))
    sigmoid = SigmoidLoss(metric).to(device)
    expected = gssf_triton.sigmoid_loss(a, b, **weights, logit_scale=10.0, logit_bias=-10.0)
    torch.testing.assert_close(sigmoid(a, b), expected)
    triplet = TripletLoss(metric, hardest=False).to(device)
    torch.testing.assert_close(triplet(a, b), gssf_triton.triplet_loss(a, b, **weights, hardest=False))
    triplet.hardest = True
    torch.testing.assert_close(triplet(a, b), gssf_triton.triplet_loss(a, b, **weights))
    distillation = DistillationLoss(metric, logit_scale=3.0)
    torch.testing.assert_close(
        distillation(a, b, a, b),
        gssf_triton.distillation_loss(a, b, **weights, teacher_a=a, teacher_b=b, logit_scale=3.0),
    )
    for module in (info_nce, sigmoid, triplet):
        module(a, b).backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
        assert "metric.W_diag" in module.state_dict()
        module.zero_grad(set_to_none=True)
    info_nce.log_logit_scale.data.fill_(100.0)
    assert float(info_nce.logit_scale.detach()) == pytest.approx(100.0)
