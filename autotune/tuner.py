"""The tuner: measure a key's candidates, keep the best, write it down, go on with the next.

Given the same measurements, the choice is the same: among candidates within noise of the best the first in order is
taken, the model's choice before all. A run that is cut short has lost the key it was at, and goes on there.
"""

from __future__ import annotations

import math
import subprocess
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gssf_triton.autotune import lookup, workloads
from gssf_triton.autotune.measure import Clock, Timing, clock_for, measure
from gssf_triton.autotune.model import candidates
from gssf_triton.autotune.space import DTYPES, Key
from gssf_triton.autotune.tables import Entry
from gssf_triton.autotune.workloads import Workload
from gssf_triton.kernels import devices
from gssf_triton.kernels.choice import Config, device_of

#: Two medians nearer than this, or than their own spreads, are the same.
NOISE = 0.02
#: Samples of every candidate at first, then of the best few, and how few.
FIRST_ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 25, 4
#: A candidate's first samples take no longer than this, but are two at least; one whose first sample is this many times
#: the best median is sampled no further.
FIRST_LOOK_SECONDS, HOPELESS = 2.0, 1.5
FINAL_LOOK_SECONDS = 10.0
#: Candidates of a key that are measured, the model's favourites.
MOST_CANDIDATES = 24
#: On first use a program is waiting.
FIRST_USE_CANDIDATES, FIRST_USE_SECONDS = 8, 20.0
#: How far a candidate's result may be from the model's choice's, by relative Frobenius norm: beyond, it computes
#: something else. The difference of two orders of summation stays well below.
RESULT_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3, torch.float64: 1e-9}
#: Tiles come before the plans that are measured with them.
LATER_KERNELS = ("plan", "gradient_plan", "chunk")


class OutOfTime(Exception):
    """The time limit is reached."""


def pick(order: Sequence[Config], timings: dict[Config, Timing]) -> Config:
    """The first in `order` of those within noise of the fastest.

    Example:
        >>> from gssf_triton.kernels.configs import ChunkConfig
        >>> from gssf_triton.autotune.measure import Timing
        >>> from gssf_triton.autotune.tuner import pick
        >>> first, second = ChunkConfig(512, 1024), ChunkConfig(1024, 1024)
        >>> pick([first, second], {first: Timing(1.01, 0.0), second: Timing(1.0, 0.0)})
        ChunkConfig(rows=512, columns=1024)
    """
    fastest = min(timings.values(), key=lambda t: (t.seconds, t.spread))

    def is_near(one: Timing) -> bool:
        return one.seconds <= fastest.seconds * (1 + max(NOISE, (one.spread + fastest.spread) / 2))

    return next(c for c in order if is_near(timings[c]))


def _tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [part.detach() for part in parts if isinstance(part, Tensor) and part.is_floating_point()]


def _agrees(result: Any, reference: list[Tensor], dtype: torch.dtype) -> bool:
    for ours, expected in zip(_tensors(result), reference, strict=True):
        wide = torch.promote_types(expected.dtype, torch.float32)  # inside the reduction: S may fill half the memory
        error = torch.linalg.vector_norm(ours - expected, dtype=wide)
        if not error <= RESULT_TOLERANCE[dtype] * torch.linalg.vector_norm(expected, dtype=wide):
            return False
    return True


def _affordable(budget: float, seconds: float, most: int) -> int:
    """How many samples of `seconds` fit a budget, from 2 to `most`."""
    return max(2, min(most, int(budget / seconds) if seconds > 0 else most))


def _first_look(call: Callable[[], Any], clock: Clock, best: float) -> Timing:
    """A candidate's timing; one sample is enough where it is hopeless."""
    sample = clock.sample(call)
    if sample > HOPELESS * best:
        return Timing(sample, 0.0)
    return measure([call], clock, _affordable(FIRST_LOOK_SECONDS, sample, FIRST_ROUNDS), warm_up=0)[0]


def tune_key(
    key: Key,
    order: Sequence[Config],
    workload: Workload,
    clock: Clock,
    deadline: float = math.inf,
    *,
    hurried: bool = False,
) -> tuple[Config, Timing]:
    """The configuration to keep for a key, and its time.

    Args:
        key: The key.
        order: Its candidates, those to be preferred in a tie first; the first is taken to compute the right thing.
        workload: Makes a candidate's call.
        clock: Time.
        deadline: When to stop, by the clock.
        hurried: At the deadline, choose among what was measured by then rather than give up.

    Raises:
        OutOfTime: the deadline passed before there was an answer.
        RuntimeError: no candidate runs.
    """
    timings: dict[Config, Timing] = {}
    reference: list[Tensor] | None = None
    last: Exception | None = None
    for config in order:
        if clock.now() >= deadline:
            if hurried and len(timings) > 1:
                break
            raise OutOfTime(str(key))
        call = workload(config)
        try:
            result = call()
            if reference is None:
                reference = [part.clone() for part in _tensors(result)]  # a call may write to the same buffer again
            elif not _agrees(result, reference, DTYPES[key.dtype]):
                warnings.warn(f"{config} computes something else for {key}: passed over", stacklevel=2)
                continue
            del result
            timings[config] = _first_look(call, clock, min((t.seconds for t in timings.values()), default=math.inf))
        except Exception as error:  # a compiler or driver that refuses a tile: the others are still there
            last = error
    if not timings:
        raise RuntimeError(f"no configuration of {key} runs: {last}")
    if clock.now() >= deadline and not hurried:
        raise OutOfTime(str(key))
    best = sorted(timings, key=lambda c: (timings[c].seconds, order.index(c)))[:FINALISTS]
    # The model's choice is always among them: to leave it takes more than noise.
    finalists = [c for c in timings if c in best or c == order[0]]
    budget = min(FINAL_LOOK_SECONDS, max(deadline - clock.now(), 0.0) if hurried else math.inf)
    often = _affordable(budget / len(finalists), max(timings[c].seconds for c in finalists), FINAL_ROUNDS)
    final = dict(zip(finalists, measure([workload(c) for c in finalists], clock, often), strict=True))
    chosen = pick(finalists, final)
    return chosen, final[chosen]


@cache
def git(*arguments: str) -> str:
    """What git prints in the checkout that this package is run from, "" for an installed one."""
    # `autotune` lies at the top of the checkout, or in site-packages.
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit, or ""."""
    return git("rev-parse", "HEAD")


def make_entry(config: Config, timing: Timing) -> Entry:
    """The table's line of a measurement, to four digits: more would only be noise in a diff."""
    seconds, spread = float(f"{timing.seconds:.4g}"), float(f"{timing.spread:.2g}")
    return Entry(config, seconds, spread, str(torch.__version__), devices.package_version("triton"), commit())


@dataclass(frozen=True)
class Report:
    """What a run of the tuner did: keys tuned, tuned before, failed (with the reason), and left for the next run."""

    tuned: tuple[Key, ...]
    skipped: tuple[Key, ...]
    failed: tuple[tuple[Key, str], ...]
    left: tuple[Key, ...]


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Each key once, tiles before plans, and in a fixed order otherwise."""
    return sorted(set(keys), key=lambda key: (key.kernel in LATER_KERNELS, key))


def tune(
    keys: Iterable[Key],
    where: torch.device,
    *,
    clock: Clock | None = None,
    time_limit: float = math.inf,
    force: bool = False,
    hurried: bool = False,
    most_candidates: int = MOST_CANDIDATES,
    build: Callable[[Key, torch.device], Workload] = workloads.build,
    progress: Callable[[Key, str], None] = lambda key, outcome: None,
) -> Report:
    """Tune each key that the user's results lack, writing each down as soon as it is found.

    Args:
        keys: What to tune, in any order.
        where: On which device.
        clock: Time; the device's own where None.
        time_limit: Seconds after which no candidate is begun; the first key is finished all the same, so that every run
            gets further.
        force: Tune keys anew that were tuned before.
        hurried: Keep to the limit at the first key, too, and choose among what was measured by then.
        most_candidates: How many of the model's favourites to measure.
        build: Makes the workload of a key.
        progress: Called with each key and its outcome in words.

    Returns:
        The report; called again with the same keys, `tune` goes on with those left.
    """
    clock = clock or clock_for(where)
    deadline = clock.now() + time_limit
    tuned: list[Key] = []
    skipped: list[Key] = []
    failed: list[tuple[Key, str]] = []
    work = in_order(keys)
    for index, key in enumerate(work):
        device = device_of(key.call(where))
        if not force and key in lookup.store_for(device).read():
            skipped.append(key)
            progress(key, "tuned before")
            continue
        limit = deadline if tuned or failed or hurried else math.inf
        try:
            if clock.now() >= limit:
                raise OutOfTime(str(key))
            with torch.no_grad(), lookup.tuning():
                order = candidates(key, device.arch, most_candidates)
                config, timing = tune_key(key, order, build(key, where), clock, limit, hurried=hurried)
        except OutOfTime:
            return Report(tuple(tuned), tuple(skipped), tuple(failed), tuple(work[index:]))
        except RuntimeError as error:  # out of memory, or nothing runs: the next key may
            failed.append((key, str(error).splitlines()[0]))
            progress(key, f"failed: {failed[-1][1]}")
            continue
        lookup.learn(device, {key: make_entry(config, timing)}, overwrite=force)
        tuned.append(key)
        progress(key, f"{config}, {timing.seconds * 1e3:.4g} ms ± {timing.spread:.0%}")
    return Report(tuple(tuned), tuple(skipped), tuple(failed), ())


def tune_on_first_use(key: Key, where: torch.device) -> None:
    """Tune one key, and the tiles it is measured with, in bounded time: `GSSF_AUTOTUNE=on`.

    A key that cannot be tuned leaves its shape to the model, with a warning; random numbers and results of the caller
    are not disturbed.
    """
    keys = [key]
    if key.kernel == "plan":
        keys.append(replace(key, kernel="pairwise"))
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        report = tune(keys, where, time_limit=FIRST_USE_SECONDS, hurried=True, most_candidates=FIRST_USE_CANDIDATES)
    for late in report.left:
        warnings.warn(
            f"{late} was not tuned within {FIRST_USE_SECONDS:.0f} s: the model's choice is taken", stacklevel=2
        )
    for failure, why in report.failed:
        warnings.warn(f"{failure} could not be tuned ({why}): the model's choice is taken", stacklevel=2)
