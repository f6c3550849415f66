"""What the toolchain's tests share: a compiler and a GPU that are not here, and every operator that depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import gssf_triton
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.plans import PLANS
from gssf_triton.kernels.toolchain import Assembler, Toolchain
from support import reference, region_word_reference
from support.tuner_kit import H100, pretend

NEW, OLD = Assembler("/a/new/ptxas", (13, 4)), Assembler("/an/old/ptxas", (12, 8))
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    toolchain.forget()
    yield
    toolchain.forget()


def install(patch: pytest.MonkeyPatch, found: Assembler, carried: Assembler | None = None) -> None:
    """As if Triton used `found` for every architecture."""
    patch.setattr(toolchain, "toolchain", lambda arch: Toolchain(found, carried))


@pytest.fixture(name="on_hopper")
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations, precisions and assembler are those of an H100; the interpreter computes."""
    from gssf_triton.kernels import launch

    with pretend(monkeypatch, H100):
        monkeypatch.setattr(launch, "identify", lambda where: H100)
        yield


@pytest.fixture(name="launched")
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    from gssf_triton.kernels.fold import fold_kernel

    names: list[str] = []
    start = type(fold_kernel).__getitem__

    def spy(kernel: Callable[..., object], grid: tuple[int, ...]) -> object:
        names.append(kernel.__name__)
        return start(kernel, grid)

    monkeypatch.setattr(type(fold_kernel), "__getitem__", spy)
    return names


def tensors(dtype: torch.dtype, rows: tuple[int, int] = (9, 13)) -> dict[str, torch.Tensor]:
    """Leaves: features in `dtype`, weights in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    found = {"a": reference.features(rows[0], 24, dtype=dtype), "b": reference.features(rows[1], 24, dtype=dtype)}
    found |= reference.weights("diag+blocks", 3, 8, wide)  # type: ignore[arg-type]
    return {name: x.requires_grad_() for name, x in found.items()}


def every_operator(dtype: torch.dtype) -> None:
    """Every operator that has an exposed kernel, forward and backward, held to float64."""
    for normalize in (False, True):
        for kind in PLANS:
            with force_plan(kind):
                reference.check("pairwise_sim", tensors(dtype), normalize=normalize, backend="triton")
        reference.check("pairwise_terms", tensors(dtype), normalize=normalize, backend="triton")
        reference.check("paired_sim", tensors(dtype, (9, 9)), normalize=normalize, backend="triton")
    x = tensors(dtype)
    x["x"] = x.pop("a")
    del x["b"]
    for side in ("a", "b"):
        reference.check("transform", {name: t.detach().requires_grad_() for name, t in x.items()}, side=side)
    problem = region_word_reference.problem((2, 3), (5, 4), 3, 8, dtype=dtype)
    region_word_reference.check("cross_attention_sim", problem, backend="triton")
    plain = {name: t.detach() for name, t in tensors(dtype, (9, 9)).items()}
    with force_plan("fold_product"):  # the product of another dtype is our kernel's
        gssf_triton.pairwise_sim(*plain.values(), out_dtype=torch.float32, backend="triton")
    gssf_triton.topk(*plain.values(), k=3, backend="triton")
    gssf_triton.info_nce(*plain.values(), logit_scale=torch.tensor(10.0), backend="triton")
    gssf_triton.late_interaction(
        *(x[None] for x in list(plain.values())[:2]), *list(plain.values())[2:], backend="triton"
    )
