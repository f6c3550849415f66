"""If `kernels.toolchain` keeps kernels from running, the operators compute the same with torch's own products."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import reference
from support.toolchain_kit import (  # noqa: F401
    HALF,
    NEW,
    OLD,
    SINGLE,
    every_operator,
    hopper,
    install,
    nothing_remembered,
    recorder,
    tensors,
)
from support.tuner_kit import pretend

import gssf_triton
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.devices import Device

pytestmark = pytest.mark.kernels


def test_an_old_assembler_leaves_exposed_kernels_to_torch(
    on_hopper: None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, OLD)
    with pytest.warns(UserWarning, match="some kernels are left to torch's own operations") as warned:
        every_operator(HALF)
        torch.set_float32_matmul_precision("high")
        every_operator(SINGLE)
    (said,) = [str(w.message) for w in warned if "left to torch" in str(w.message)]
    assert "ptxas 12.8 (/an/old/ptxas)" in said and "triton>=3.9" in said and "_PATH" in said and "doctor" in said
    # Kernels without operands from registers still run: the product, streaming, retrieval, late interaction.
    assert {"pairwise_kernel", "stream_kernel", "topk_kernel", "late_interaction_kernel", "paired_kernel"} <= set(
        launched
    )
    # The last check has passed all of them.
    assert "cross_attention_kernel" not in launched


def test_a_safe_assembler_leaves_nothing_to_torch(
    on_hopper: None, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        every_operator(HALF)
    assert {"fold_kernel", "gradient_kernel", "cross_attention_kernel"} <= set(launched)


def test_the_forms_of_exact_float32_before_triton_39(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.kernels import launch

    blackwell = Device("a-blackwell", "A Blackwell", "sm_100")
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 8))
    monkeypatch.setattr(launch, "identify", lambda where: blackwell)
    with pretend(monkeypatch, blackwell), pytest.warns(UserWarning, match="adds chained products up wrongly"):
        every_operator(SINGLE)
    assert "fold_kernel" in launched and "cross_attention_kernel" not in launched


@pytest.mark.filterwarnings("ignore:some kernels are left")
def test_second_derivatives_and_odd_shapes_of_torchs_forms(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)
    torch.set_float32_matmul_precision("high")
    x = tensors(SINGLE)

    def second(backend: str, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        S = gssf_triton.pairwise_sim(**x, normalize=True, backend=backend)
        first = torch.autograd.grad(S.square().sum(), list(x.values()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(x.values()))

    exact = second("torch", {name: t.detach().double().requires_grad_() for name, t in x.items()})
    for name, found, expected in zip(x, second("triton", x), exact, strict=True):
        reference.assert_close(found, expected, 2 * reference.TF32_TOLERANCE, name=name)

    for M, N, D, B in ((0, 3, 8, 4), (3, 0, 8, 4), (3, 3, 0, 4), (1, 1, 6, 3)):
        few = {
            "a": torch.randn(M, D),
            "b": torch.randn(N, D),
            "W_diag": torch.randn(D),
            "W_blocks": torch.randn(D // B, B, B),
        }
        leaves = {name: t.requires_grad_() for name, t in few.items()}
        gssf_triton.pairwise_sim(**leaves, backend="triton").sum().backward()
        assert all(t.grad is not None and t.grad.shape == t.shape and t.grad.isfinite().all() for t in leaves.values())


@pytest.mark.filterwarnings("ignore:some kernels are left")
def test_nan_stays_in_its_row_and_block(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)
    x = tensors(HALF)
    a = x["a"].detach()
    a[2, 3] = torch.nan
    assert gssf_triton.pairwise_sim(a, x["b"], x["W_diag"], x["W_blocks"], backend="triton").isnan().any(
        1
    ).nonzero().tolist() == [[2]]
    T = gssf_triton.transform(a, x["W_diag"], x["W_blocks"])
    monkeypatch.setattr("gssf_triton.similarity.functional.resolve_backend", lambda *_: "triton")
    assert torch.equal(gssf_triton.transform(a, x["W_diag"], x["W_blocks"]).isnan(), T.isnan())
    assert T.isnan().nonzero().tolist() == [[2, q] for q in range(8)]


@pytest.mark.filterwarnings("ignore:some kernels are left")
def test_autocast_rounds_nothing_more(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)
    for dtype in (HALF, torch.bfloat16):
        x = tensors(dtype)
        alone = gssf_triton.pairwise_sim(**x, backend="triton")
        with torch.autocast("cpu", dtype=dtype):
            inside = gssf_triton.pairwise_sim(**x, backend="triton")
        (dW,) = torch.autograd.grad(inside.float().square().sum(), x["W_blocks"])
        (expected,) = torch.autograd.grad(alone.float().square().sum(), x["W_blocks"])
        assert torch.equal(alone, inside) and torch.equal(dW, expected)


def test_a_direct_launch_is_refused(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.kernels import fold, gradient, prepare
    from gssf_triton.metric import Metric

    install(monkeypatch, OLD)
    metric, x = Metric(None, torch.randn(3, 8, 8)), torch.randn(4, 24).half()
    refused = r"gradient_kernel is not launched: ptxas 12\.8 .*/an/old/ptxas.*triton>=3\.9"
    with pytest.raises(RuntimeError, match=refused):
        gradient.gradient(None, x[None], x[None], metric, 8, (True, False, True))
    # Products of fewer rows are safe.
    assert fold.fold(x, metric, normalize=False).isfinite().all()
    rows, inverse = prepare.prepare(x, metric, True, HALF, None)
    grads = prepare.finish(rows.float(), x, rows, None, inverse, metric, torch.ones(()), (True, False, True))
    assert all(grad is None or grad.isfinite().all() for grad in grads)
