"""Every kernel starts on the device that holds its tensors, whichever is current."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor

import gssf_triton
from gssf_triton.kernels.configs import FoldConfig

pytestmark = pytest.mark.kernels

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def test_a_kernel_starts_on_the_device_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.kernels.launch import launch

    current = ["cuda:0"]
    started: list[object] = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = str(device)

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda **arguments: started.append((grid, arguments, current[-1]))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(current[-1][-1]))
    config = FoldConfig(64, 32, num_warps=4, num_stages=2)
    launch(Kernel(), (3, 2), torch.device("cuda:1"), config, x_ptr=1)
    launch(Kernel(), (4,), torch.device("cpu"), config, x_ptr=2)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    wanted = [((3, 2), {"x_ptr": 1, **options}, "cuda:1"), ((4,), {"x_ptr": 2, **options}, "cuda:0")]
    assert started == wanted and current == ["cuda:0"]


def test_no_kernel_starts_otherwise() -> None:
    sources = {path.name: path.read_text("utf-8") for path in KERNELS.glob("*.py")}
    launched = {name for name, text in sources.items() if re.search(r"launch(?:_ranked)?\(\n? *\w+_kernel", text)}
    written = {name for name, text in sources.items() if re.search(r"^def \w+_kernel\(", text, re.MULTILINE)}
    assert launched == written and len(written) == 11
    assert not [name for name, text in sources.items() if re.search(r"_kernel\[", text)]


@pytest.mark.parametrize("grid", [(2**31,), (1, 65_536), (1, 1, 65_536)])
def test_a_grid_beyond_the_devices_is_refused(grid: tuple[int, ...]) -> None:
    from gssf_triton.kernels.launch import launch

    with pytest.raises(AssertionError, match="a grid of"):
        launch(None, grid, torch.device("cpu"), FoldConfig(64, 32, 4, 2))


def _similarity(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return gssf_triton.pairwise_sim(a, b, W_diag, W_blocks, backend="triton")


def _terms(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
    return torch.stack(gssf_triton.pairwise_terms(a, b, W_diag, W_blocks, backend="triton"))


def _masked(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def masked(a: Tensor, b: Tensor, W_diag: Tensor, W_blocks: Tensor) -> Tensor:
        masks = (torch.arange(x.shape[1], device=x.device) < 7 + torch.arange(len(x), device=x.device)[:, None] % 9
                 for x in (a, b))  # fmt: skip
        region_mask, word_mask = masks
        return call(a, b, W_diag, W_blocks, region_mask=region_mask, word_mask=word_mask, backend="triton")

    return masked


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (_similarity, "pairwise_kernel"),
        (_terms, "pairwise_kernel"),
        (_masked(gssf_triton.late_interaction), "late_interaction_kernel"),
        (_masked(gssf_triton.cross_attention_sim), "cross_attention_kernel"),
    ],
    ids=["pairwise_sim", "pairwise_terms", "late_interaction", "cross_attention_sim"],
)
def test_work_beyond_a_grid_is_cut_into_launches(
    call: Callable[..., Tensor], kernel: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, forward and backward, whatever a grid holds."""
    from gssf_triton.kernels import launch as limits
    from gssf_triton.kernels.choice import force_plan

    leaves = [torch.randn(*shape, device=device, requires_grad=True)
              for shape in ((5, 40, 16), (5, 33, 16), (16,), (2, 8, 8))]  # fmt: skip
    started: list[str] = []

    def counted(kernel: Any, *arguments: Any, **named: Any) -> None:
        started.append(kernel.__name__)
        limits.launch(kernel, *arguments, **named)

    def both() -> list[Tensor]:
        out = call(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    with force_plan("one_pass"):
        whole = both()
        # As many programs as the fold of all rows has.
        monkeypatch.setattr(limits, "MAX_GRID", (10, 65_535, 65_535))
        for module in ("pairwise", "late_interaction", "cross_attention"):
            monkeypatch.setattr(f"gssf_triton.kernels.{module}.launch", counted)
        cut = both()
    assert started.count(kernel) > 1
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


MATRICES: list[tuple[str, Tensor, tuple[int | None, int | None, int | None], bool]] = [
    ("even", torch.empty(1, 32, 48), (0, 48, None), True),
    ("ragged", torch.empty(1, 32, 47), (0, 47, None), False),
    ("ragged rows alone", torch.empty(1, 31, 48), (0, 48, None), True),
    ("transposed", torch.empty(1, 32, 48).mT, (0, None, 48), True),
    ("transposed, ragged", torch.empty(1, 31, 48).mT, (0, None, 48), True),
    ("an even pitch, a ragged side", torch.empty(1, 32, 48)[..., :47], (0, 48, None), False),
    ("a batch", torch.empty(3, 32, 48), (1536, 48, None), True),
    ("a batch of ragged pitch", torch.empty(5000).as_strided((3, 32, 48), (1537, 48, 1)), (1537, 48, None), False),
    ("one column", torch.empty(1, 32, 1), (0, 1, None), False),
    ("one column, transposed", torch.empty(1, 32, 1).mT, (0, None, 1), False),
    ("one row", torch.empty(1, 1, 48), (0, 48, None), True),
    ("expanded", torch.empty(1, 1, 1).expand(1, 32, 48), (0, 0, 0), True),
]  # fmt: skip


@pytest.mark.parametrize(("x", "strides", "even"), [case[1:] for case in MATRICES], ids=[case[0] for case in MATRICES])
def test_what_the_compiler_is_told_of_a_matrix(x: Tensor, strides: tuple[int | None, ...], even: bool) -> None:
    from gssf_triton.kernels.launch import pair_strides

    assert pair_strides(x) == (*strides, even)
    if x.shape[0] == 1:
        assert pair_strides(x[0]) == (0, *strides[1:], even), "a matrix without a batch"


def test_a_tile_is_told_apart_by_everything_it_holds() -> None:
    """Triton's cache on disk and its hooks know a constant by its text: they must see the defaults, too."""
    from gssf_triton.kernels.args import Tile
    from gssf_triton.kernels.gradient import GradientTile

    tile = Tile(64, BLOCK_K=32)
    assert tile == Tile(BLOCK_M=64, BLOCK_K=32, PRECISION="ieee") and hash(tile) == hash(Tile(64, 32))
    assert tile != Tile(64, BLOCK_K=32, EVEN_D=True) and tile != GradientTile(64, BLOCK_K=32)
    assert all(copy == tile and copy.BLOCK_K == 32 for copy in (pickle.loads(pickle.dumps(tile)), deepcopy(tile)))
    written = json.loads(json.dumps({"constant": tile}))["constant"]
    assert all(field.name in written for field in dataclasses.fields(Tile))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one() -> None:
    a, b = torch.randn(300, 64), torch.randn(200, 64)
    W_diag, W_blocks = torch.randn(64), torch.randn(4, 16, 16)
    with torch.cuda.device(0):
        expected, found = (
            gssf_triton.pairwise_sim(*(x.to(where) for x in (a, b, W_diag, W_blocks)), backend="triton").cpu()
            for where in ("cuda:0", "cuda:1")
        )
    assert torch.equal(found, expected)
