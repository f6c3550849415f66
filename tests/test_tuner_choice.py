"""What is chosen: keys and their buckets, neighbours, the model, ties. Pure functions, and no chance in them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tuner_kit import measured

from gssf_triton.autotune import lookup, model, space
from gssf_triton.autotune.measure import Timing
from gssf_triton.autotune.space import (
    DTYPES,
    NUMERICS,
    PAIR_KERNELS,
    SPACES,
    Key,
    bucket,
    distance,
    make_key,
    numerics,
)
from gssf_triton.autotune.tables import Entry
from gssf_triton.autotune.tuner import pick
from gssf_triton.kernels import choice, configs, plans
from gssf_triton.kernels.choice import Config
from gssf_triton.kernels.configs import ChunkConfig, CrossAttentionConfig, FoldConfig, GradientConfig, PairwiseConfig
from gssf_triton.kernels.plans import PlanChoice
from gssf_triton.kernels.retrieval_configs import RANKED_ROWS
from gssf_triton.kernels.targets import ARCHITECTURES
from gssf_triton.streaming.chunks import chunk_shape

TILE = Key("pairwise", "bf16", 1024, 32, 8192, 8192)
LARGE = PairwiseConfig(128, 128, 64, num_warps=8, num_stages=3)
TUNED = PairwiseConfig(64, 128, 32, num_warps=4, num_stages=3)
OTHER = PairwiseConfig(64, 64, 32, num_warps=4, num_stages=4)


# ------------------------------------------------------------------------------------------------------------- keys


@given(st.integers(1, 2**40))
def test_a_bucket_is_the_nearest_power_of_two(rows: int) -> None:
    side = bucket(rows)
    assert side & (side - 1) == 0
    assert side <= rows * 2**0.5 * (1 + 1e-12) and rows <= side * 2**0.5 * (1 + 1e-12)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64))
def test_a_batch_is_filed_as_one_matrix_of_as_many_entries(M: int, N: int, batch: int) -> None:
    key = make_key("pairwise", "bf16", M, N, 256, 32, batch)
    assert 0.49 < key.M * key.N / (batch * M * N) < 2.01


def test_all_sizes_of_a_bucket_share_a_key() -> None:
    keys = {make_key("pairwise", "bf16", n, n, 512, 64) for n in range(5800, 11500)}
    assert keys == {Key("pairwise", "bf16", 512, 64, 8192, 8192)}
    assert make_key("fold", "bf16", 100, 7777, 512, 64).N == 0, "a row kernel has no columns"


@pytest.mark.parametrize("name", NUMERICS)
def test_numerics_have_names(name: str) -> None:
    assert numerics(DTYPES[name], tf32=name == "tf32") == name


# ------------------------------------------------------------------------------------------------------- neighbours


def test_distance_grows_with_the_shape_and_stops_where_the_code_differs() -> None:
    assert distance(TILE, TILE) == 0
    near, far = replace(TILE, M=4096), replace(TILE, M=4096, N=2048)
    assert 0 < (distance(TILE, near) or 0) < (distance(TILE, far) or 0)
    assert distance(TILE, replace(TILE, dtype="fp16")) is not None, "the same bits a number, the same tiles"
    assert distance(TILE, replace(TILE, B=24)) is not None, "padded to 32"
    for stranger in ({"kernel": "terms"}, {"dtype": "fp32"}, {"B": 64}, {"B": 0}, {"N": 0}, {"M": 64}):
        assert distance(TILE, replace(TILE, **stranger)) is None, stranger


def found(entries: Mapping[Key, Entry]) -> Config | None:
    answer = lookup.find(TILE, "sm_90", entries)
    return answer and answer.entry.config


def test_exact_then_the_nearest_neighbour_then_the_model() -> None:
    near, far = replace(TILE, M=4096), replace(TILE, D=256, M=2048)
    entries = {TILE: measured(TUNED), near: measured(OTHER), far: measured(LARGE)}
    assert found(entries) == TUNED
    del entries[TILE]
    answer = lookup.find(TILE, "sm_90", entries)
    assert answer and answer.entry.config == OTHER and str(near) in answer.why
    assert found({}) is None


def test_an_illegal_entry_is_passed_over() -> None:
    too_large = PairwiseConfig(256, 256, 128, num_warps=8, num_stages=4)
    not_in_the_space = PairwiseConfig(64, 48, 32, num_warps=4, num_stages=2)
    for bad in (too_large, not_in_the_space, FoldConfig(64, 64, 4, 2)):
        assert found({TILE: measured(bad)}) is None
        assert found({TILE: measured(bad), replace(TILE, M=4096): measured(OTHER)}) == OTHER


def test_equally_near_neighbours_are_settled_by_order_not_by_the_file() -> None:
    sides = [(replace(TILE, M=4096), measured(TUNED)), (replace(TILE, M=16384), measured(OTHER))]
    answers = set()
    for _ in range(10):
        random.shuffle(sides)
        answers.add(found(dict(sides)))
    assert answers == {TUNED}


# -------------------------------------------------------------------------------------------------- space and model


KEYS = [
    Key("pairwise", "bf16", 1024, 64, 8192, 8192),
    Key("pairwise", "fp32", 512, 32, 2048, 2048),
    Key("product", "bf16", 1024, 0, 64, 2**20),
    Key("terms", "fp16", 256, 128, 512, 512),
    Key("fold", "bf16", 1024, 16, 8192, 0),
    Key("paired", "tf32", 256, 24, 512, 0),
    Key("gradient", "bf16", 1024, 64, 8192, 8192),
    Key("gradient", "fp32", 1024, 256, 8192, 0),
    Key("plan", "bf16", 1024, 64, 512, 512),
    Key("gradient_plan", "fp32", 1024, 64, 512, 512),
    Key("chunk", "fp32", 1024, 0, 8192, 8192),
    Key("stream", "fp16", 1024, 0, 8192, 8192),
    Key("stream_teacher", "fp32", 512, 0, 2048, 2048),
    Key("ranked", "bf16", 1024, 0, *RANKED_ROWS),
    Key("ranked", "fp32", 256, 0, *RANKED_ROWS),
    Key("late_interaction", "bf16", 1024, 0, 64, 32),
    Key("late_interaction", "fp32", 256, 0, 16, 1),
    Key("cross_attention", "fp16", 1024, 0, 64, 32),
    Key("cross_attention", "tf32", 256, 0, 64, 64),
]


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_89", "sm_120", "gfx90a", "interpreter"])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates_start_with_the_models_choice_and_are_all_legal(key: Key, arch: str) -> None:
    found = model.candidates(key, arch)
    assert found[0] == model.default(key, arch)
    assert len(found) == len(set(found))
    assert all(model.is_legal(config, key, arch) for config in found)
    if arch == "sm_90":
        assert found[:-1] == model.candidates(key, arch, limit=len(found) - 1), "the same order, cut where it is told"
    assert len(found) > 1, "there is something to tune on GPUs the gate does not compile for, too"


@pytest.mark.parametrize("arch", ["cpu", "sm_90"])
def test_a_chunk_keeps_to_the_losses_budget(arch: str) -> None:
    key = Key("chunk", "fp32", 1024, 0, 2**20, 2**20)
    device = torch.device("cpu" if arch == "cpu" else "cuda")
    entry_bytes = (configs.TORCH_CHUNK_ARRAYS if arch == "cpu" else configs.TRITON_CHUNK_ARRAYS) * 4
    found = model.candidates(key, arch)
    assert ChunkConfig(8192, 32768) not in found and len(found) >= 10
    for config in found[1:]:
        with choice.use(chunk=config):
            shape = chunk_shape(2**20, 2**20, 1024, torch.float32, device, entry_bytes=entry_bytes)
        assert shape == (config.rows, config.columns), "what is measured is what runs"


def test_retrievals_tile_is_the_same_for_every_batch_gallery_and_shard() -> None:
    keys = {make_key("ranked", "fp32", Q, N, 512, 0) for Q in (1, 100, 5000) for N in (7, 10**3, 10**7)}
    assert len(keys) == 1


@pytest.mark.parametrize(("R", "L"), [(1, 1), (10, 5), (36, 32), (49, 60), (64, 64)])
@pytest.mark.parametrize("kernel", PAIR_KERNELS)
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "interpreter"])
def test_a_pairs_key_has_a_tile_that_holds_the_pair(kernel: str, R: int, L: int, arch: str) -> None:
    key = make_key(kernel, "fp16", R, L, 512, 0)
    assert key.M >= R and key.N >= L
    exact = choice.modelled(choice.Call(kernel, torch.device("cuda"), torch.float16, False, R, L, 512), arch)
    assert model.is_legal(exact, key, arch)
    if kernel == "cross_attention":
        assert exact == model.default(key, arch), "a table's tile is one for the pair itself"


def test_a_pair_larger_than_the_kernel_takes_has_no_tile_of_cross_attentions() -> None:
    key = Key("cross_attention", "fp16", 512, 0, 256, 32)
    tile = CrossAttentionConfig(128, 1, 32, 64, num_warps=8, num_stages=2)
    assert not SPACES["cross_attention"].fits_key(tile, key)


def test_chunks_beyond_the_matrix_are_not_measured() -> None:
    found = model.candidates(Key("chunk", "fp32", 64, 0, 512, 2048), "cpu")
    assert found[0] == ChunkConfig(512, 1024), "the model's choice"
    assert set(found) == {ChunkConfig(rows, columns) for rows in (256, 512) for columns in (1024, 2048)}


def test_a_gpu_with_less_shared_memory_gets_smaller_tiles() -> None:
    key = Key("product", "bf16", 1024, 0, 8192, 8192)
    large = PairwiseConfig(128, 128, 64, num_warps=8, num_stages=4)
    assert model.fits(large, key, "sm_80") and not model.fits(replace(large, BLOCK_K=128), key, "sm_89")
    assert model.fits(replace(large, num_stages=3), key, "sm_89")


def test_the_models_choices_are_those_of_the_pure_functions() -> None:
    bf16 = torch.bfloat16
    assert model.default(TILE, "sm_90") == configs.pairwise_config(8192, 8192, 1024, 32, bf16, "sm_90")
    gradient = Key("gradient", "tf32", 1024, 64, 8192, 8192)
    assert model.default(gradient, "sm_80") == configs.gradient_config(64, torch.float32, "sm_80", tf32=True)
    plan = model.default(Key("plan", "bf16", 1024, 32, 64, 64), "sm_90")
    assert isinstance(plan, PlanChoice)
    assert plan.resolve(64, 64) == plans.modelled_plan(1, 64, 64, 1024, 32, 2, tf32=False)


def test_the_model_prefers_tiles_that_suit_the_shape() -> None:
    """Large S: large tiles that use what they load; S of one small tile: no program idles over rows that are not."""
    large = model.candidates(Key("product", "bf16", 1024, 0, 8192, 8192), "sm_90")[1]
    small = model.candidates(Key("product", "bf16", 1024, 0, 64, 64), "sm_90")[1]
    assert isinstance(large, PairwiseConfig) and isinstance(small, PairwiseConfig)
    assert large.BLOCK_M * large.BLOCK_N >= 128 * 128 > small.BLOCK_M * small.BLOCK_N


@pytest.mark.parametrize(
    ("kernel", "values", "complaint"),
    [
        ("chunk", {"rows": 512}, "must have the fields rows, columns"),
        ("chunk", {"rows": 512, "columns": 4096, "x": 1}, "must have the fields"),
        ("chunk", {"rows": 512.0, "columns": 4096}, "rows of chunk must be one of"),
        ("chunk", {"rows": True, "columns": 4096}, "rows of chunk must be one of"),
        ("cross_attention", vars(CrossAttentionConfig(32, 1, 64, 64, 8, 2)), "no legal tile"),
        ("plan", {"kind": "fast", "fold": "fewer"}, "kind of plan must be one of"),
        ("plan", [], "config must be an object"),
    ],
)
def test_configurations_from_files_are_checked(kernel: str, values: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        space.parse_config(kernel, values, Key(kernel, "fp32", 64, 0, 64, 64))


def test_a_gradient_program_must_hold_whole_blocks() -> None:
    key = Key("gradient", "bf16", 512, 128, 512, 512)
    narrow = GradientConfig(32, 32, 64, 16, num_warps=4, num_stages=1)
    assert not model.is_legal(narrow, key, "sm_90")
    assert model.is_legal(narrow, replace(key, B=64), "sm_90")


@pytest.mark.parametrize(("M", "N"), [(5, 9), (9, 5), (7, 7)])
def test_a_tables_plan_follows_the_rows(M: int, N: int) -> None:
    fewer, more = PlanChoice("fold_product", "fewer").resolve(M, N), PlanChoice("fold_product", "more").resolve(M, N)
    assert fewer.fold_b == (N < M) and more.fold_b == (not N < M)


# ------------------------------------------------------------------------------------------------------------- ties


def test_noise_is_settled_by_order() -> None:
    first, second, third = (ChunkConfig(rows, 4096) for rows in (512, 1024, 2048))
    order = [first, second, third]
    timings = {first: Timing(1.015, 0.0), second: Timing(1.2, 0.0), third: Timing(1.0, 0.0)}
    assert pick(order, timings) == first
    assert pick(order, {**timings, first: Timing(1.05, 0.0)}) == third
    assert pick(order, {**timings, first: Timing(1.05, 0.1)}) == first, "a spread of its own widens the noise"
    assert pick(list(reversed(order)), timings) == third


@given(st.lists(st.floats(0.98, 1.02), min_size=2, max_size=6), st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_measuring(seconds: list[float], chance: random.Random) -> None:
    order = [ChunkConfig(256 * 2**i, 4096) for i in range(len(seconds))]
    pairs = [(config, Timing(time, 0.05)) for config, time in zip(order, seconds, strict=True)]
    expected = pick(order, dict(pairs))
    chance.shuffle(pairs)
    assert pick(order, dict(pairs)) == expected == order[0]
