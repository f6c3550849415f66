"""Tuning, with a clock that only the tests turn: what is measured, kept, cut short and taken up again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tuner_kit import CPU, FakeClock, cache, stream_key  # noqa: F401

from gssf_triton.autotune import lookup, measure, tuner, workloads
from gssf_triton.autotune.measure import Timing
from gssf_triton.autotune.model import candidates
from gssf_triton.autotune.space import Key
from gssf_triton.autotune.tuner import OutOfTime, tune, tune_key
from gssf_triton.kernels.configs import ChunkConfig, chunk_config
from gssf_triton.kernels.devices import identify, identify_for_torch
from gssf_triton.streaming import chunks, driver
from gssf_triton.streaming.chunks import stream_chunk

pytestmark = pytest.mark.usefixtures("cache")

KEY = stream_key()
KEYS = [stream_key(rows) for rows in (4096, 8192, 16384, 32768)]
BEST = ChunkConfig(1024, 2048)


def seconds_of(config: Any) -> float:
    """A machine on which `BEST` is fastest, and others the slower the further off."""
    return 0.01 * (1 + abs(config.rows - BEST.rows) / 1000 + abs(config.columns - BEST.columns) / 10000)


def build(key: Key, where: torch.device) -> workloads.Workload:
    return lambda config: lambda: seconds_of(config)


# ------------------------------------------------------------------------------------------------------- one key


def test_the_fastest_candidate_is_kept() -> None:
    order = candidates(KEY, "cpu")
    config, timing = tune_key(KEY, order, build(KEY, CPU), FakeClock())
    assert config == BEST and timing == Timing(pytest.approx(0.01), 0.0)


def test_within_noise_the_models_choice_stays() -> None:
    order = candidates(KEY, "cpu")
    flat: workloads.Workload = lambda config: lambda: 0.01 if config == order[0] else 0.0099  # noqa: E731
    config, _ = tune_key(KEY, order, flat, FakeClock())
    assert config == order[0] == chunk_config("cpu")


def test_the_same_measurements_give_the_same_choice() -> None:
    order = candidates(KEY, "cpu")
    assert len({tune_key(KEY, order, build(KEY, CPU), FakeClock())[0] for _ in range(3)}) == 1


def test_a_candidate_that_does_not_run_is_passed_over() -> None:
    order = candidates(KEY, "cpu")

    def fails(config: Any) -> Callable[[], Any]:
        def call() -> float:
            if config == BEST:
                raise RuntimeError("out of resource: shared memory")
            return seconds_of(config)

        return call

    config, _ = tune_key(KEY, order, fails, FakeClock())
    assert config != BEST and seconds_of(config) < seconds_of(order[0])


def test_a_key_of_which_nothing_runs_says_why() -> None:
    def fails(config: Any) -> Callable[[], Any]:
        def call() -> float:
            raise ValueError("no such tile")

        return call

    with pytest.raises(RuntimeError, match=r"no configuration of chunk .* runs: no such tile"):
        tune_key(KEY, candidates(KEY, "cpu"), fails, FakeClock())


def test_a_candidate_that_computes_something_else_is_passed_over() -> None:
    """However fast: the model's choice, which the tests hold to float64, says what is right."""
    order = candidates(KEY, "cpu")[:3]
    right = torch.randn(50)

    class Clock(FakeClock):
        def sample(self, call: Callable[[], Any]) -> float:
            return 0.001 if not torch.equal(call(), right) else 0.01

    wrong: workloads.Workload = lambda config: lambda: right * (1.5 if config == order[1] else 1)  # noqa: E731
    with pytest.warns(UserWarning, match="computes something else"):
        config, _ = tune_key(KEY, order, wrong, Clock())
    assert config == order[0]
    nan: workloads.Workload = lambda config: lambda: right / (0 if config == order[1] else 1)  # noqa: E731
    with pytest.warns(UserWarning, match="computes something else"):
        tune_key(KEY, order, nan, Clock())


def test_slow_candidates_are_not_measured_again_and_again() -> None:
    order = [ChunkConfig(1024, 4096), ChunkConfig(256, 1024)]
    clock = FakeClock()
    slow: workloads.Workload = lambda config: lambda: 60.0 if config == order[1] else 0.1  # noqa: E731
    config, _ = tune_key(KEY, [*order, ChunkConfig(512, 4096)], slow, clock)
    assert config == order[0]
    quick = FakeClock()
    tune_key(KEY, [order[0]], slow, quick)
    assert quick.samples > tuner.FINAL_ROUNDS
    glacial = FakeClock()
    tune_key(KEY, [order[1]], slow, glacial)
    assert glacial.samples < 10


def test_the_deadline_is_kept_between_candidates() -> None:
    clock = FakeClock()
    with pytest.raises(OutOfTime):
        tune_key(KEY, candidates(KEY, "cpu"), build(KEY, CPU), clock, deadline=0.5)
    assert 0.5 <= clock.now() < 1.0


# ------------------------------------------------------------------------------------------------- many keys


def test_results_are_written_down_one_by_one_and_used_at_once() -> None:
    store = lookup.store_for(identify_for_torch(CPU))
    seen: list[int] = []
    report = tune(
        KEYS, CPU, clock=FakeClock(), build=build, progress=lambda key, outcome: seen.append(len(store.read()))
    )
    assert report.tuned == tuple(sorted(KEYS)) and not report.failed and not report.left
    assert seen == [1, 2, 3, 4]
    entry = store.read()[KEYS[0]]
    assert entry.config == BEST and entry.seconds == 0.01
    assert entry.torch == torch.__version__ and entry.triton and entry.commit == tuner.commit()
    assert stream_chunk(5000, 5000, 256, torch.float32, CPU) == BEST


def test_a_run_cut_short_goes_on_where_it_stopped() -> None:
    clock = FakeClock()
    first = tune(KEYS, CPU, clock=clock, build=build)
    whole = clock.now()
    lookup.store_for(identify_for_torch(CPU)).path.unlink()
    lookup.forget()

    runs = []
    for _ in range(20):
        lookup.forget()  # a process of its own
        runs.append(tune(KEYS, CPU, clock=FakeClock(), build=build, time_limit=whole / 5))
        if not runs[-1].left:
            break
    assert len(runs) > 2, "the limit cut it short"
    for earlier, later in pairwise(runs):
        assert set(later.skipped) == set(earlier.skipped) | set(earlier.tuned)
        assert set(later.tuned) | set(later.left) == set(earlier.left)
    assert sum(len(run.tuned) for run in runs) == len(first.tuned) == len(KEYS)


def test_no_key_but_the_first_is_begun_past_the_limit() -> None:
    """However short the limit, every run gets further."""
    report = tune(KEYS, CPU, clock=FakeClock(), build=build, time_limit=1e-9)
    assert report.tuned == (KEYS[0],) and report.left == tuple(KEYS[1:])


def test_in_a_hurry_the_best_so_far_is_taken() -> None:
    clock = FakeClock()
    tune(KEYS[:1], CPU, clock=clock, build=build)
    hurry = FakeClock()
    report = tune(KEYS[1:], CPU, clock=hurry, build=build, time_limit=0.3, hurried=True)
    assert report.tuned == (KEYS[1],) and report.left == tuple(KEYS[2:])
    assert hurry.now() < clock.now()
    entry = lookup.entries_for(identify_for_torch(CPU))[KEYS[1]]
    assert seconds_of(entry.config) <= seconds_of(chunk_config("cpu"))
    nothing = tune(KEYS[2:], CPU, clock=FakeClock(), build=build, time_limit=1e-9, hurried=True)
    assert not nothing.tuned and nothing.left == tuple(KEYS[2:])


def test_tuned_keys_are_skipped_unless_forced() -> None:
    tune(KEYS, CPU, clock=FakeClock(), build=build)
    clock = FakeClock()
    assert tune(KEYS, CPU, clock=clock, build=build).skipped == tuple(sorted(KEYS))
    assert clock.samples == 0
    slower = lambda key, where: lambda config: lambda: 2 * seconds_of(config)  # noqa: E731
    assert tune(KEYS, CPU, clock=clock, build=slower, force=True).tuned == tuple(sorted(KEYS))
    assert lookup.entries_for(identify_for_torch(CPU))[KEYS[0]].seconds == 0.02


def test_a_key_that_fails_does_not_stop_the_others() -> None:
    def partly(key: Key, where: torch.device) -> workloads.Workload:
        if key == KEYS[1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return build(key, where)

    report = tune(KEYS, CPU, clock=FakeClock(), build=partly)
    assert report.failed == ((KEYS[1], "CUDA out of memory. Tried to allocate 2 GiB."),)
    assert len(report.tuned) == len(KEYS) - 1


def test_tiles_are_tuned_before_the_plans_that_are_measured_with_them() -> None:
    plan = Key("plan", "bf16", 64, 8, 64, 64)
    work = [
        plan,
        replace(plan, kernel="gradient_plan"),
        replace(plan, kernel="pairwise"),
        replace(plan, kernel="product"),
    ]
    assert [key.kernel for key in tuner.in_order([*work, plan])] == ["pairwise", "product", "gradient_plan", "plan"]


def test_first_use_warns_where_it_found_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSSF_AUTOTUNE", "on")
    monkeypatch.setattr(tuner, "FIRST_USE_SECONDS", 1e-9)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="was not tuned within") as warned:
        for _ in range(3):
            assert stream_chunk(64, 64, 256, torch.float32, CPU) == chunk_config("cpu")
    assert len(warned) == 1
    assert torch.equal(torch.get_rng_state(), state), "the program's random numbers are its own"


# ------------------------------------------------------------------------------------------------- the real thing


def test_a_chunk_is_tuned_for_real() -> None:
    key = stream_key(64, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = tune([key], CPU, most_candidates=3)
    assert report.tuned == (key,)
    entry = lookup.entries_for(identify_for_torch(CPU))[key]
    assert entry.seconds and 0 < entry.seconds < 10 and entry.config in candidates(key, "cpu")[:3]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "key",
    [
        Key("pairwise", "fp32", 32, 8, 16, 16),
        Key("product", "fp32", 32, 0, 16, 16),
        Key("terms", "fp32", 32, 8, 16, 16),
        Key("fold", "fp32", 32, 8, 16, 0),
        Key("paired", "fp32", 32, 8, 16, 0),
        Key("gradient", "fp32", 32, 8, 16, 16),
        Key("gradient", "fp32", 32, 0, 16, 0),
        Key("plan", "fp32", 32, 8, 16, 32),
        Key("gradient_plan", "fp32", 32, 8, 16, 16),
        Key("stream", "fp32", 32, 0, 16, 32),
        Key("stream", "fp16", 32, 0, 16, 32),
        Key("stream_teacher", "fp32", 32, 0, 32, 16),
        Key("ranked", "fp32", 32, 0, 16, 32),
        Key("late_interaction", "fp32", 32, 0, 16, 8),
        Key("cross_attention", "fp32", 32, 0, 16, 8),
    ],
    ids=str,
)
def test_every_kernel_can_be_tuned(key: Key, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls are real, and each candidate's result is held to the model's; in the interpreter they are few."""
    where = torch.device(device, 0) if device == "cuda" else CPU
    monkeypatch.setattr(tuner, "FIRST_ROUNDS", 1)

    class Clock(FakeClock):
        def sample(self, call: Callable[[], Any]) -> float:
            return 1.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # NumPy warns of NaN and Inf, and of the numbers that Triton 3.6's interpreter makes of arrays; a GPU does not.
        for category in (RuntimeWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module="triton.runtime.interpreter")
        report = tune([key], where, clock=Clock(), most_candidates=3)
    assert report.tuned == (key,)
    target = identify(where)
    # All take as long on this clock: the model's choice stays.
    assert lookup.entries_for(target)[key].config == candidates(key, target.arch)[0]


def test_chunks_are_measured_with_the_losses_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ChunkConfig] = []
    shape = chunks.chunk_shape

    def chunk_shape(*arguments: Any, **further: Any) -> tuple[int, int]:
        asked.append(chunks.stream_chunk(*arguments))
        return shape(*arguments, **further)

    monkeypatch.setattr(driver, "chunk_shape", chunk_shape)
    small, large = ChunkConfig(256, 1024), ChunkConfig(1024, 2048)
    workload = workloads.build(Key("chunk", "fp32", 16, 0, 512, 2048), CPU)
    results = [workload(config)() for config in (small, large)]
    assert asked == [small, large]
    # The slope's products with both sides, whatever the chunks.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert results[0][3].shape == (512, 16) and results[0][4].shape == (2048, 16)


def test_measuring_takes_turns_and_warms_up() -> None:
    calls: list[str] = []

    class Clock(FakeClock):
        def sample(self, call: Callable[[], Any]) -> float:
            calls.append(call())
            return {"a": 1.0, "b": 2.0}[calls[-1]]

    found = measure.measure([lambda: "a", lambda: "b"], Clock(), rounds=2)
    assert "".join(calls) == "aabb" + "ab" + "ba"
    assert found == [Timing(1.0, 0.0), Timing(2.0, 0.0)]


def test_the_cpus_clock_is_monotonic() -> None:
    clock = measure.clock_for(CPU)
    before = clock.now()
    assert clock.sample(lambda: sum(range(10_000))) > 0 and clock.now() > before


def test_entries_are_short_in_a_diff(cache: Path) -> None:  # noqa: F811
    entry = tuner.make_entry(BEST, Timing(0.0123456789, 0.0123456))
    assert (entry.seconds, entry.spread) == (0.01235, 0.012)
