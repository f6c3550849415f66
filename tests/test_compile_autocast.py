"""At home in PyTorch: torch.compile, autocast, functional transforms, no_grad and inference mode, fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.reference import assert_close, features, tolerance, weights
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import gssf_triton
from gssf_triton.nn import GSSF
from gssf_triton.similarity import functional  # noqa: F401  (registers torch.ops.gssf)

FUNCTIONS = ["pairwise_sim", "pairwise_terms", "paired_sim", "transform"]
functions = pytest.mark.parametrize("function", FUNCTIONS)


def problem(function: str, device: str, rows: tuple[int, int] = (9, 17), dtype: torch.dtype = torch.float32) -> dict:
    """Tensors, all leaves, for a call of `function`."""
    M, N = (rows[0], rows[0]) if function == "paired_sim" else rows
    sides = {"x": M} if function == "transform" else {"a": M, "b": N}
    tensors = {name: features(n, 24, dtype=dtype, device=device) for name, n in sides.items()}
    tensors |= weights("diag+blocks", 3, 8, torch.float32, device)
    return {name: x.requires_grad_() for name, x in tensors.items()}


def values_and_grads(call: Callable[..., Any], tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    out = call(**tensors, **options)
    outputs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(sum((o.float() * o.float()).sum() for o in outputs), list(tensors.values()))
    return [*(o.detach() for o in outputs), *grads]


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "normalize"),
    [*((function, True) for function in FUNCTIONS), ("pairwise_sim", False)],
    ids=lambda value: ("as-is", "normalize")[value] if isinstance(value, bool) else value,
)
def test_compiled_equals_eager(function: str, normalize: bool, backend: str, device: str, fresh_compiler: None) -> None:
    """One graph, no break, the same values and gradients."""
    call = getattr(gssf_triton, function)

    def scaled(**tensors: Tensor) -> Any:
        out = call(**{name: 1.5 * x for name, x in tensors.items()}, normalize=normalize, backend=backend)
        return tuple(o.tanh() for o in out) if isinstance(out, tuple) else out.tanh()

    tensors = problem(function, device)
    eager = values_and_grads(scaled, tensors)
    compiled = values_and_grads(torch.compile(scaled, fullgraph=True, backend="aot_eager"), tensors)
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours.dtype == expected.dtype
        assert_close(ours, expected, 2 * tolerance(torch.float32))


def test_new_sizes_do_not_compile_anew(backend: str, device: str, fresh_compiler: None) -> None:
    """One graph for the first size, one for all others with the same side to fold."""
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(gssf_triton.pairwise_sim, fullgraph=True, backend=counter)
    for rows in [(5, 9), (6, 11), (7, 13), (10, 20), (21, 34)]:
        tensors = problem("pairwise_sim", device, rows)
        compiled, eager = call(**tensors, backend=backend), gssf_triton.pairwise_sim(**tensors, backend=backend)
        assert_close(compiled, eager, 2 * tolerance(torch.float32))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("method", ["forward", "paired", "transform"])
def test_a_compiled_module(method: str, device: str, fresh_compiler: None) -> None:
    metric = GSSF(24, block_size=8).to(device)
    rows = [features(9, 24, device=device)] * (1 if method == "transform" else 2)
    call = getattr(metric, method)
    assert_close(
        torch.compile(call, fullgraph=True, backend="aot_eager")(*rows), call(*rows), 2 * tolerance(torch.float32)
    )


def operator_samples(device: str) -> dict[str, list[tuple]]:
    """Calls of every operator of torch.ops.gssf, with and without each weight, wide and tall."""
    a, b = (features(2, n, 24, device=device).requires_grad_() for n in (5, 9))
    W_diag, W_blocks = (w.requires_grad_() for w in weights("diag+blocks", 3, 8, device=device).values())
    P = features(2, 5, 9, device=device).requires_grad_()
    rows, others = a[0].detach().requires_grad_(), b[0, :5].detach().requires_grad_()
    f32, f16 = torch.float32, torch.float16
    return {
        "fold": [(rows, W_diag, W_blocks, False), (rows, W_diag, None, True), (rows, None, W_blocks.mT, False)],
        "pairwise": [
            (a, b, W_diag, W_blocks, False, f32),
            (b, a, None, W_blocks, True, f32),
            (a, b, W_diag, None, False, f16),
        ],
        "pairwise_planned": [
            (a, b, W_diag, W_blocks, normalize, dtype, kind, fold_b)
            for kind, fold_b, normalize, dtype in [
                ("one_pass", False, False, f32),
                ("one_pass", True, True, f32),
                ("fold_product", True, False, f32),
                ("fold_product", False, True, f16),
            ]
        ],
        "pairwise_terms": [(a, b, W_diag, W_blocks, False, f32), (b, a, W_diag, W_blocks, True, f32)],
        "paired": [(rows, others, W_diag, W_blocks, True, f32), (rows, others, W_diag, None, False, f32)],
        "unit_rows_vjp": [(rows.detach(), others.detach()), (a.detach(), a.detach().clone())],
        "gradient": [
            (P, b, a, W_diag, W_blocks, 8, True, True, True),
            (P, b, a, W_diag, None, 0, True, True, False),
            (P, b, a, None, W_blocks, 8, False, False, True),
            (P, b, None, W_diag, W_blocks, 8, True, False, False),
            (None, a, a.detach().clone(), W_diag, W_blocks, 8, True, True, True),
        ],
    }


def test_every_operator_has_a_sample(device: str) -> None:
    registered = {
        schema.name.removeprefix("gssf::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("gssf::")
    }
    assert set(operator_samples(device)) <= registered


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name", ["fold", "pairwise", "pairwise_planned", "pairwise_terms", "paired", "unit_rows_vjp", "gradient"]
)
def test_operators_keep_pytorchs_rules(name: str, device: str) -> None:
    """Schema, fake implementation, autograd registration, and compilation with static and dynamic shapes."""
    for sample in operator_samples(device)[name]:
        torch.library.opcheck(getattr(torch.ops.gssf, name).default, sample)


# ---------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@functions
def test_autocast_does_what_matmul_does(function: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Half-precision similarities of float32 tensors, float32 gradients."""
    tensors = problem(function, device)
    exact = [x.detach() for x in values_and_grads(getattr(gssf_triton, function), tensors, backend="torch")]
    with torch.autocast(device, dtype=dtype):
        call = getattr(gssf_triton, function)
        out = call(**tensors, backend=backend)
        outputs = list(out) if isinstance(out, tuple) else [out]
        x, *_ = tensors.values()
        assert all(o.dtype == (x @ x.T).dtype == dtype for o in outputs)
    grads = torch.autograd.grad(sum((o.float() * o.float()).sum() for o in outputs), list(tensors.values()))
    assert all(g.dtype == torch.float32 for g in grads)
    for ours, expected in zip([*outputs, *grads], exact, strict=True):
        assert_close(ours, expected, 2 * tolerance(dtype))


def test_autocast_leaves_float64_alone(backend: str, device: str) -> None:
    tensors = problem("pairwise_sim", device, dtype=torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gssf_triton.pairwise_sim(**tensors, backend=backend).dtype == torch.float64


def test_autocast_joins_two_dtypes(backend: str, device: str) -> None:
    """A bfloat16 tower beside a float32 one, as matmul takes them under autocast; out_dtype still has its say."""
    tensors = problem("pairwise_sim", device)
    tensors["b"] = tensors["b"].detach().bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert gssf_triton.pairwise_sim(**tensors, backend=backend).dtype == torch.bfloat16
        S = gssf_triton.pairwise_sim(**tensors, out_dtype=torch.float32, backend=backend)
        assert S.dtype == torch.float32


def test_autocast_inside_a_compiled_graph(backend: str, device: str, fresh_compiler: None) -> None:
    def step(**tensors: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return gssf_triton.pairwise_sim(**tensors, backend=backend)

    tensors = problem("pairwise_sim", device)
    eager = values_and_grads(step, tensors)
    compiled = values_and_grads(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors)
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours.dtype == expected.dtype
        assert_close(ours, expected, 2 * tolerance(torch.bfloat16))


# ---------------------------------------------------------------- modes and transforms


@functions
def test_no_grad_and_inference_mode(function: str, backend: str, device: str) -> None:
    tensors = problem(function, device)
    call = getattr(gssf_triton, function)
    out = call(**tensors, backend=backend)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            quiet = call(**tensors, backend=backend)
        for ours, expected in zip(*((o if isinstance(o, tuple) else (o,)) for o in (quiet, out)), strict=True):
            assert not ours.requires_grad and expected.requires_grad
            assert torch.equal(ours, expected)


def test_functional_gradients(device: str) -> None:
    """torch.func.grad, for functional training loops. Torch's custom operators refuse it; backend="torch" has none."""
    tensors = {name: x.detach() for name, x in problem("pairwise_sim", device).items()}

    def loss(W_diag: Tensor, W_blocks: Tensor) -> Tensor:
        S = gssf_triton.pairwise_sim(tensors["a"], tensors["b"], W_diag, W_blocks, backend="torch")
        return S.square().sum()

    found = torch.func.grad(loss, argnums=(0, 1))(tensors["W_diag"], tensors["W_blocks"])
    leaves = [tensors[name].clone().requires_grad_() for name in ("W_diag", "W_blocks")]
    for ours, expected in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert_close(ours, expected, 2 * tolerance(torch.float32))


def test_vmap_over_metrics(device: str) -> None:
    """A batch of metrics over the same rows: model ensembles, per-class metrics."""
    a, b = features(5, 24, device=device), features(7, 24, device=device)
    W_diag, W_blocks = torch.randn(4, 24, device=device), torch.randn(4, 3, 8, 8, device=device)

    def call(W_diag: Tensor, W_blocks: Tensor) -> Tensor:
        return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend="torch")

    S = torch.func.vmap(call)(W_diag, W_blocks)
    expected = torch.stack([call(*metric) for metric in zip(W_diag, W_blocks, strict=True)])
    assert_close(S, expected, 2 * tolerance(torch.float32))


@functions
def test_meta_tensors_propagate_shapes(function: str, device: str) -> None:
    """No data, no kernel: memory planning and lazy initialisation see the right shapes and dtypes."""
    tensors = problem(function, device)
    real = getattr(gssf_triton, function)(**tensors)
    fake = getattr(gssf_triton, function)(**{name: x.detach().to("meta") for name, x in tensors.items()})
    for ours, expected in zip(*((o if isinstance(o, tuple) else (o,)) for o in (fake, real)), strict=True):
        assert ours.is_meta and ours.shape == expected.shape and ours.dtype == expected.dtype


def test_a_leading_dimension_of_unknown_size(device: str) -> None:
    """No guard on it: the compiler does not know what it is."""
    torch._dynamo.reset()
    W_diag = torch.randn(12, device=device)
    compiled = torch.compile(lambda a, b: gssf_triton.pairwise_sim(a, b, W_diag), fullgraph=True, backend="eager")
    a, b = torch.randn(3, 6, 12, device=device), torch.randn(3, 7, 12, device=device)
    torch._dynamo.decorators.mark_unbacked(a, 0)
    torch.testing.assert_close(compiled(a, b), gssf_triton.pairwise_sim(a, b, W_diag))
