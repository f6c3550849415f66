"""Configurations and plans: pure data and arithmetic, testable on any machine."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from gssf_triton.kernels import choice, configs, plans
from gssf_triton.kernels.targets import ARCHITECTURES

HALF, FULL = torch.bfloat16, torch.float32
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ARCHES = [*ARCHITECTURES, "interpreter"]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B", [0, 4, 5, 24, 32, 64, 100, 128, 256])
def test_configurations_are_legal_tiles(arch: str, dtype: torch.dtype, B: int) -> None:
    tile = configs.pairwise_config(1000, 1000, 512, B, dtype, arch)
    fold = configs.fold_config(1000, 512, B, dtype, arch)
    gradient = configs.gradient_config(B, dtype, arch, tf32=False)
    sides = (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, fold.BLOCK_M, fold.BLOCK_K)
    sides += (gradient.BLOCK_M, gradient.BLOCK_N, gradient.BLOCK_C, gradient.BLOCK_P)
    assert all(side >= configs.MIN_DOT and side & (side - 1) == 0 for side in sides)
    assert configs.padded_block(B) <= gradient.BLOCK_C, "a program of the gradient kernel holds whole blocks"
    assert gradient.BLOCK_C % gradient.BLOCK_P == 0


def test_configurations_are_frozen_and_depend_on_nothing_else() -> None:
    first = configs.pairwise_config(8192, 8192, 1024, 32, HALF, "sm_90")
    assert first == configs.pairwise_config(8192, 8192, 1024, 32, HALF, "sm_90")
    with pytest.raises(FrozenInstanceError):
        first.BLOCK_M = 1  # type: ignore[misc]


@pytest.mark.parametrize("B,padded", [(0, 0), (1, 1), (4, 4), (5, 8), (24, 32), (100, 128), (256, 256)])
def test_blocks_are_padded_to_powers_of_two(B: int, padded: int) -> None:
    assert configs.padded_block(B) == padded


def test_precision_is_tf32_only_where_allowed() -> None:
    assert configs.dot_precision(FULL, "sm_90", tf32=True) == "tf32"
    assert configs.dot_precision(FULL, "sm_90", tf32=False) == "ieee"
    assert configs.dot_precision(FULL, "sm_90", tf32=False, whole_rows=True) == "tf32x3"
    assert configs.dot_precision(FULL, "gfx942", tf32=False, whole_rows=True) == "ieee"
    assert configs.dot_precision(HALF, "sm_90", tf32=True) == "ieee"


def plan(M: int, N: int, D: int = 512, B: int = 32) -> plans.Plan:
    """The model's, in half precision."""
    return plans.modelled_plan(1, M, N, D, B, 2, tf32=False)


def test_small_problems_take_one_launch_and_large_ones_the_library() -> None:
    assert plan(64, 64, 256).kind == "one_pass"
    assert plan(8192, 8192, 1024).kind == "fold_product"


def test_the_side_with_fewer_rows_is_folded() -> None:
    assert not plan(64, 10**6).fold_b and plan(10**6, 64).fold_b and not plan(100, 100).fold_b


def test_plans_swap_with_the_sides() -> None:
    """S and its transpose are the same work."""
    for M, N in [(64, 4096), (512, 2048), (10_000, 300)]:
        assert plan(M, N, B=64).kind == plan(N, M, B=64).kind


def test_force_plan_holds_inside_and_ends_with_the_block() -> None:
    def chosen() -> str:
        return choice.choose("plan", torch.device("cpu"), HALF, 8192, 8192, 1024, 32).kind

    assert chosen() == "fold_product"
    with choice.force_plan("one_pass"):
        assert chosen() == "one_pass"
    assert chosen() == "fold_product"
    with pytest.raises(ValueError, match="kind must be one of 'one_pass', 'fold_product', got 'fast'"):
        choice.force_plan("fast")


@pytest.mark.kernels
def test_kernel_constants_agree_with_the_package() -> None:
    from gssf_triton.constants import NORM_EPS
    from gssf_triton.kernels import tile

    assert tile.NORM_EPS.value == NORM_EPS
