"""What is differentiable once: second derivatives raise, torch.func and torch.compile work, infinities stay put."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.losses_problem import LOSSES, problem
from support.reference import assert_close, features, tolerance
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, vmap

import gssf_triton

losses = pytest.mark.parametrize("loss", LOSSES)
FORMS = {
    "info_nce": lambda x, y, w: gssf_triton.info_nce(x, y, w, logit_scale=2.0, backend="torch"),
    "info_nce, smoothed": lambda x, y, w: gssf_triton.info_nce(
        x, y, w, logit_scale=2.0, label_smoothing=0.1, symmetric=False, backend="torch"
    ),
    "sigmoid_loss": lambda x, y, w: gssf_triton.sigmoid_loss(
        x, y, w, logit_scale=2.0, logit_bias=-1.0, backend="torch"
    ),
    "triplet_loss": lambda x, y, w: gssf_triton.triplet_loss(x, y, w, backend="torch"),
    "triplet_loss, all": lambda x, y, w: gssf_triton.triplet_loss(x, y, w, hardest=False, backend="torch"),
    "distillation_loss": lambda x, y, w: gssf_triton.distillation_loss(
        x, y, w, teacher_a=y, teacher_b=x, logit_scale=2.0, backend="torch"
    ),
    "late_interaction": lambda x, y, w: gssf_triton.late_interaction(
        x.view(2, 3, 4), y.view(3, 2, 4), w, backend="torch"
    ).sum(),
    "late_interaction, lse": lambda x, y, w: gssf_triton.late_interaction(
        x.view(2, 3, 4), y.view(3, 2, 4), w, pooling="lse-mean", normalize=True, backend="torch"
    ).sum(),
    "cross_attention_sim": lambda x, y, w: gssf_triton.cross_attention_sim(
        x.view(2, 3, 4), y.view(2, 3, 4), w, backend="torch"
    ).sum(),
}
forms = pytest.mark.parametrize("form", FORMS)


@losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_of_losses_are_refused(loss: str, reduction: str, backend: str, device: str) -> None:
    """Whichever of its inputs the gradient is taken of: it must never be a constant to the second one."""
    options = [{"hardest": True}, {"hardest": False}] if loss == "triplet_loss" else [{}]
    for more in options:
        p = problem(loss, 6, reduction=reduction, device=device, **more)
        for name, leaf in p.leaves.items():
            for other in p.leaves.values():
                other.requires_grad_(other is leaf)
            (first,) = torch.autograd.grad(p.call(backend).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match=f"{loss} is differentiable once"):
                torch.autograd.grad(first.square().sum(), leaf)
                pytest.fail(f"{loss}: the second derivative in {name} did not raise")


@losses
def test_a_graph_of_the_gradient_costs_nothing_until_it_is_used(loss: str, backend: str, device: str) -> None:
    """backward(create_graph=True), as some optimisers call it."""
    p = problem(loss, 6, device=device)
    gradients = torch.autograd.grad(p.call(backend), list(p.leaves.values()))
    graph = torch.autograd.grad(p.call(backend), list(p.leaves.values()), create_graph=True)
    assert all(torch.equal(x, y.detach()) for x, y in zip(gradients, graph, strict=True))


def by_hand(form: str, x: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, w)]
    return list(torch.autograd.grad(FORMS[form](*leaves), leaves))


@forms
def test_functional_transforms(form: str) -> None:
    """torch.func's grad, vmap, gradients a batch, gradients of a batch's sum, and jacrev, as autograd has them."""
    call: Callable[..., Tensor] = FORMS[form]
    x, y, w = features(3, 6, 4), features(3, 6, 4), torch.rand(4) + 0.5
    expected = [by_hand(form, x[i], y[i], w) for i in range(3)]
    tol = 2 * tolerance(torch.float32)

    def check(found: Any, wanted: Any) -> None:
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, tol, name=form)

    check(grad(call, argnums=(0, 1, 2))(x[0], y[0], w), expected[0])
    check([vmap(call, in_dims=(0, 0, None))(x, y, w)], [torch.stack([call(x[i], y[i], w) for i in range(3)])])
    stacked = [torch.stack(parts) for parts in zip(*expected, strict=True)]
    check(vmap(grad(call, argnums=(0, 1, 2)), in_dims=(0, 0, None))(x, y, w), stacked)

    def total(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return vmap(call, in_dims=(0, 0, None))(x, y, w).sum()

    check(grad(total, argnums=(0, 1, 2))(x, y, w), (*stacked[:2], stacked[2].sum(0)))
    check([jacrev(call)(x[0], y[0], w)], [expected[0][0]])
    with pytest.raises(RuntimeError, match="differentiable once"):
        jacrev(jacrev(call))(x[0], y[0], w)
    with pytest.raises(RuntimeError, match="forward mode"):
        jacfwd(call)(x[0], y[0], w)


def test_vmap_over_batches_of_ids() -> None:
    x, y, ids = features(3, 6, 4), features(3, 6, 4), torch.randint(0, 3, (3, 6))

    def call(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        return gssf_triton.info_nce(x, y, torch.ones(4), logit_scale=2.0, ids=ids, reduction="none", backend="torch")

    assert torch.equal(vmap(call)(x, y, ids), torch.stack([call(*parts) for parts in zip(x, y, ids, strict=True)]))


def test_vmap_over_searches() -> None:
    """A batch of galleries, of metrics, of exclusions; the queries may be one for all."""
    queries, galleries, metrics = features(4, 8), features(3, 9, 8), torch.rand(3, 8) + 0.5
    ids, exclude = torch.arange(9) // 2, torch.randint(0, 9, (3, 4))

    def best(gallery: Tensor, w: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
        return gssf_triton.topk(queries, gallery, w, k=3, exclude=exclude, backend="torch")

    def place(gallery: Tensor, w: Tensor, exclude: Tensor) -> Tensor:
        return gssf_triton.ranks(
            queries, gallery, w, query_ids=ids[:4], gallery_ids=ids, exclude=exclude, backend="torch"
        )

    each = list(zip(galleries, metrics, exclude, strict=True))
    values, indices = vmap(best)(galleries, metrics, exclude)
    assert torch.equal(values, torch.stack([best(*x)[0] for x in each]))
    assert torch.equal(indices, torch.stack([best(*x)[1] for x in each]))
    assert torch.equal(vmap(place)(galleries, metrics, exclude), torch.stack([place(*x) for x in each]))
    itself = vmap(lambda x: gssf_triton.topk(x, x, torch.ones(8), k=1, normalize=True, backend="torch")[1])(galleries)
    assert torch.equal(itself[..., 0], torch.arange(9).expand(3, 9))


@losses
def test_one_tensor_twice_under_compile(loss: str, device: str) -> None:
    """Ids stand for both sides' where there is no group, a teacher may be its pupil's own tensor, a side the other."""
    backend = "torch"  # it is the graph that refused them; what is behind the operators makes no difference
    for more in [{"hardest": True}, {"hardest": False}] if loss == "triplet_loss" else [{}]:
        p = problem(loss, 9, ids=True, device=device, **more)
        if loss == "distillation_loss":
            p.fixed = {"teacher_a": p.leaves["a"], "teacher_b": p.leaves["b"]}

        def call(leaves: dict[str, Tensor], p: Any = p) -> Tensor:
            given = {**leaves, "b": leaves["a"]} if loss == "info_nce" else leaves
            out: Tensor = getattr(gssf_triton, loss)(**given, **p.fixed, **p.options, backend=backend)
            return out

        torch.compiler.reset()
        eager = call(p.leaves)
        compiled = torch.compile(call, fullgraph=True, backend="eager")(p.leaves)
        assert_close(compiled, eager, tolerance(torch.float32))
        wanted = [x for name, x in p.leaves.items() if not (loss == "info_nce" and name == "b")]
        pairs = zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted), strict=True)
        for ours, expected in pairs:
            # The scale's gradient is a mean over 9 rows of differences of similarities, of either sign.
            size = torch.full_like(expected, 0.3) if expected.numel() == 1 else None
            assert_close(ours, expected, tolerance(torch.float32), size=size)


ROWS = {
    "info_nce": (
        lambda x, y, be: gssf_triton.info_nce(
            x, y, torch.ones(16), logit_scale=1.0, symmetric=False, reduction="none", backend=be
        ),
        lambda x, y: F.cross_entropy(x @ y.T, torch.arange(5), reduction="none"),
    ),
    "sigmoid_loss": (
        lambda x, y, be: gssf_triton.sigmoid_loss(
            x, y, torch.ones(16), logit_scale=1.0, logit_bias=0.0, reduction="none", backend=be
        ),
        lambda x, y: -F.logsigmoid((2 * torch.eye(5) - 1) * (x @ y.T)).sum(1),
    ),
    "distillation_loss": (
        lambda x, y, be: gssf_triton.distillation_loss(
            x,
            y,
            torch.ones(16),
            teacher_a=y.detach(),
            teacher_b=y.detach(),
            logit_scale=1.0,
            reduction="none",
            backend=be,
        ),
        lambda x, y: F.kl_div(
            (x @ y.T).log_softmax(1), (y @ y.T).log_softmax(1).detach(), log_target=True, reduction="none"
        ).sum(1),
    ),
}


@pytest.mark.parametrize("loss", ROWS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_an_infinite_gradient_stays_in_its_row(loss: str, bad: float, backend: str) -> None:
    """Row i of a one-way loss reads a[i] alone: a[j]'s gradient is what torch has, whatever comes in for i."""
    ours, stored = ROWS[loss]
    x, y = torch.randn(5, 16), torch.randn(5, 16)
    incoming = torch.tensor([1.0, bad, -0.5, 1.0, 0.0])
    leaf = x.clone().requires_grad_()
    stored(leaf, y).backward(incoming)
    expected = leaf.grad
    leaf = x.clone().requires_grad_()
    ours(leaf, y, backend).backward(incoming)
    assert expected is not None and leaf.grad is not None
    others = [0, 2, 3, 4]
    assert torch.isfinite(leaf.grad[others]).all()
    assert not torch.isfinite(leaf.grad[1]).all() or bad == 1e30
    torch.testing.assert_close(leaf.grad[others], expected[others], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_infinite_gradient_of_no_violation_is_none(hardest: bool, bad: float, backend: str) -> None:
    """Pair 1 violates nothing, nor does any pair with it: its features and all others' get what they get without it."""
    x = torch.eye(4, 16)
    x[2:] = torch.ones(2, 16) / 4  # the last two are each other's hardest negatives, at the margin
    gradients = []
    for second in (0.0, bad):
        leaf = x.clone().requires_grad_()
        loss = gssf_triton.triplet_loss(
            leaf, x.clone(), torch.ones(16), hardest=hardest, reduction="none", backend=backend
        )
        loss.backward(torch.tensor([1.0, second, 1.0, 2.0]))
        gradients.append(leaf.grad)
    assert gradients[0] is not None and gradients[0][2:].any()
    assert torch.equal(gradients[0], gradients[1])


def test_a_transform_under_compile() -> None:
    """The compiler must not differentiate through what a function computes, and get 0, in place of its gradient."""
    x, y, w = features(6, 4), features(6, 4), torch.rand(4) + 0.5
    for form in ("info_nce", "late_interaction"):
        torch.compiler.reset()
        found = torch.compile(grad(FORMS[form]), backend="aot_eager")(x, y, w)
        assert_close(found, by_hand(form, x, y, w)[0], 2 * tolerance(torch.float32))


@losses
def test_forward_mode_is_refused(loss: str, device: str) -> None:
    p = problem(loss, 6, device=device)
    with forward_ad.dual_level():
        p.leaves = {name: x.detach() for name, x in p.leaves.items()}
        p.leaves["a"] = forward_ad.make_dual(p.leaves["a"], torch.ones_like(p.leaves["a"]))
        with pytest.raises(NotImplementedError, match="jvp"):
            p.call("torch")


def test_batched_gradients(backend: str, device: str) -> None:
    """As torch.autograd.functional's vectorised Jacobians take them."""
    x, b, W_diag = (torch.randn(*shape, device=device) for shape in ((3, 8), (4, 8), (8,)))
    W_blocks = torch.randn(2, 4, 4, device=device)
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: gssf_triton.pairwise_sim(x, b, W_diag, W_blocks, normalize=True, backend=backend),
        lambda x: gssf_triton.transform(x, W_diag, W_blocks, backend=backend),
        lambda x: gssf_triton.sigmoid_loss(
            x, b[:3], W_diag, logit_scale=2.0, logit_bias=-1.0, reduction="none", backend=backend
        ),
        lambda x: gssf_triton.triplet_loss(x, b[:3], W_diag, reduction="none", backend=backend),
    ]
    jacobian = torch.autograd.functional.jacobian
    for call in calls:
        assert_close(jacobian(call, x, vectorize=True), jacobian(call, x), tolerance(torch.float32))
