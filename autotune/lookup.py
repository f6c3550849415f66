"""Which configuration runs: the one place where that is decided.

A shape's own key in a table; the nearest tuned neighbour's; the model's choice — the first there is. The user's results
come before the tables that ship. An answer is remembered for the exact shape, so that a call costs one look into a
dictionary. The same tables give the same answers always.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from gssf_triton.autotune import mode, model
from gssf_triton.autotune.keys import RANKED_ROWS, WITHOUT_COLUMNS, Key, distance, make_key, numerics
from gssf_triton.autotune.space import SPACES, TORCH_KERNELS, Config
from gssf_triton.autotune.store import Store
from gssf_triton.autotune.tables import Entry, TableError, shipped_for
from gssf_triton.backend import TRITON_RELEASE
from gssf_triton.kernels.configs import (
    CrossAttentionConfig,
    FoldConfig,
    GradientConfig,
    LateInteractionConfig,
    PairwiseConfig,
)
from gssf_triton.kernels.devices import Device, identify, identify_for_torch
from gssf_triton.kernels.plans import Plan, PlanChoice, as_compiled, forced_plan
from gssf_triton.kernels.retrieval_configs import RetrievalConfig

#: Answers remembered before all are forgotten: a program whose every batch has another size must not grow for ever.
MOST_REMEMBERED = 16_384


@dataclass(frozen=True)
class Answer:
    """A configuration and why it runs."""

    config: Config
    why: str
    entry: Entry | None = None


_remembered: dict[tuple[Any, ...], Config] = {}
_overrides: dict[str, Config] = {}
_stores: dict[Device, Store] = {}
_entries: dict[Device, dict[Key, Entry]] = {}
#: Guards the tables; re-entrant, since tuning looks configurations up itself.
_lock = threading.RLock()
#: True while the tuner measures: what it launches must not be tuned in turn.
_tuning = False
#: What this process has tried to tune on first use: once is enough, whatever came of it.
_tried: set[tuple[Device, Key]] = set()


def _after_fork() -> None:
    """In a child: whichever other thread of the parent held the lock, or was tuning, is not here to end it."""
    global _lock, _tuning
    _lock, _tuning = threading.RLock(), False
    _overrides.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def forget() -> None:
    """Forget every answer and table read so far: the next call reads the files, and the environment, again."""
    with _lock:
        _remembered.clear()
        _stores.clear()
        _entries.clear()
        _tried.clear()


def shipped_entries(device: Device) -> dict[Key, Entry]:
    """What the package's own tables hold for a device."""
    try:
        return {key: entry for table in shipped_for(device) for key, entry in table.entries.items()}
    except TableError as fault:
        warnings.warn(f"a table of the package is damaged ({fault}): going on with the model", stacklevel=2)
        return {}


def store_for(device: Device) -> Store:
    """The user's results for a device."""
    with _lock:
        if device not in _stores:
            _stores[device] = Store(device)
        return _stores[device]


def entries_for(device: Device) -> Mapping[Key, Entry]:
    """All there is in tables for a device, read once a process."""
    with _lock:
        if device not in _entries:
            _entries[device] = {**shipped_entries(device), **store_for(device).read()}
        return _entries[device]


def learn(device: Device, found: Mapping[Key, Entry], *, overwrite: bool = False) -> None:
    """Take new results into the user's file and into this process's answers."""
    with _lock:
        _entries[device] = {**shipped_entries(device), **store_for(device).add(found, overwrite=overwrite)}
        _remembered.clear()


def find(
    key: Key, device: Device, entries: Mapping[Key, Entry], fallback: Config, *, deterministic: bool = False
) -> Answer:
    """Exact, then nearest tuned neighbour, then the model: a pure function of its arguments.

    Args:
        key: What is asked for.
        device: Where it runs.
        entries: The tables' entries for the device.
        fallback: The model's choice for the exact shape.
        deterministic: Pass over configurations that do not give the same bits every time.
    """
    space = SPACES[key.kernel]

    def usable(config: Config) -> bool:
        return (space.is_deterministic(config) or not deterministic) and model.is_legal(config, key, device.arch)

    exact = entries.get(key)
    if exact is not None and usable(exact.config):
        config = exact.config if exact.source == "measured" else _modelled(key.kernel, exact.config, device)
        return Answer(config, f"{exact.source}, for this very key", exact)
    near = [
        (far, other)
        for other, entry in entries.items()
        if entry.source == "measured" and (far := distance(key, other)) is not None and usable(entry.config)
    ]
    if near:
        far, other = min(near)
        return Answer(
            entries[other].config, f"measured, for the neighbour {other}, {far:.1f} doublings off", entries[other]
        )
    return Answer(_modelled(key.kernel, fallback, device), "model: no table has this key or a tuned neighbour")


def _modelled(kernel: str, config: Config, device: Device) -> Config:
    """A choice of the model's, in the package's tables or made anew, as the installed Triton compiles for it."""
    if kernel == "plan" and isinstance(config, PlanChoice):
        return as_compiled(config, device.arch, TRITON_RELEASE)
    return config


@contextmanager
def tuning() -> Iterator[None]:
    """Answer without tuning inside, and forget afterwards what was answered."""
    global _tuning
    before, _tuning = _tuning, True
    try:
        yield
    finally:
        _tuning = before
        _remembered.clear()


def _may_tune(device: Device, where: torch.device) -> bool:
    """Whether this is a moment at which the tuner may run."""
    if _tuning or where.type not in ("cuda", "cpu") or mode.is_tracing() or mode.is_capturing(where):
        return False
    return device.arch != "interpreter" or mode.interpreter_may_be_tuned()


def _resolve(
    kernel: str, where: torch.device, dtype: torch.dtype, M: int, N: int, D: int, B: int, batch: int, tf32: bool
) -> tuple[Config, bool]:
    """(configuration, whether it may be remembered)."""
    device = identify_for_torch(where) if kernel in TORCH_KERNELS else identify(where)
    fallback = model.choice(kernel, M, N, D, B, dtype, device.arch, tf32=tf32, batch=batch)
    chosen = mode.mode()
    if chosen == "off" or not M * D * batch or (not N and kernel not in WITHOUT_COLUMNS):
        return _modelled(kernel, fallback, device), True
    key = make_key(kernel, numerics(dtype, tf32), M, N, D, B, batch)
    lasting = True
    with _lock:
        entry = entries_for(device).get(key)
        if chosen == "on" and (entry is None or entry.source == "model") and (device, key) not in _tried:
            if _may_tune(device, where):
                from gssf_triton.autotune import tuner

                _tried.add((device, key))
                tuner.tune_on_first_use(key, where)
            else:
                # During a capture, say: the key is still to be tuned, at its next use.
                lasting = _tuning or device.arch == "interpreter"
        deterministic = torch.are_deterministic_algorithms_enabled()
        return find(key, device, entries_for(device), fallback, deterministic=deterministic).config, lasting


def choose(
    kernel: str,
    where: torch.device,
    dtype: torch.dtype,
    M: int,
    N: int,
    D: int,
    B: int,
    batch: int = 1,
    tf32: bool | None = None,
) -> Config:
    """The configuration of `kernel` for features of `dtype` on a device, and this shape.

    `tf32`: float32 products may round to TF32; torch's setting where None.
    """
    # One look: another thread may end its override between two.
    forced = _overrides.get(kernel)
    if forced is not None:
        return forced
    if tf32 is None:
        tf32 = torch.get_float32_matmul_precision() != "highest"
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads() if kernel in TORCH_KERNELS else 0
    shape = (kernel, where, dtype, M, N, D, B, batch, tf32, deterministic, threads)
    config = _remembered.get(shape)
    if config is None:
        config, lasting = _resolve(kernel, where, dtype, M, N, D, B, batch, tf32)
        # "cuda" without a number is whichever device is current.
        if lasting and not (where.type == "cuda" and where.index is None):
            if len(_remembered) >= MOST_REMEMBERED:
                _remembered.clear()
            _remembered[shape] = config
    return config


@contextmanager
def use(kernel: str, config: Config) -> Iterator[None]:
    """Launch `kernel` with this configuration inside, in every thread: for the tuner, one at a time."""
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            _overrides.pop(kernel, None)
        else:
            _overrides[kernel] = before


def tile(
    M: int, N: int, D: int, B: int, dtype: torch.dtype, where: torch.device, *, kernel: str, batch: int
) -> PairwiseConfig:
    """The one-pass kernel's tile, as "pairwise", "product" (nothing to fold) or "terms"."""
    return cast(PairwiseConfig, choose(kernel, where, dtype, M, N, D, B, batch))


def rows(M: int, D: int, B: int, dtype: torch.dtype, where: torch.device, *, kernel: str) -> FoldConfig:
    """The tile of a kernel that owns rows, "fold" or "paired"."""
    return cast(FoldConfig, choose(kernel, where, dtype, M, 0, D, B))


def gradient(
    M: int, N: int, D: int, B: int, dtype: torch.dtype, where: torch.device, *, batch: int, tf32: bool | None
) -> GradientConfig:
    """The gradient kernel's tile for R = P x, P (M, N), or for the fold's gradients alone, N = 0."""
    return cast(GradientConfig, choose("gradient", where, dtype, M, N, D, B, batch, tf32))


def stream(M: int, N: int, D: int, dtype: torch.dtype, where: torch.device, *, teacher: bool) -> PairwiseConfig:
    """The streaming kernel's tile for all of S (M, N), whatever its chunks."""
    return cast(PairwiseConfig, choose("stream_teacher" if teacher else "stream", where, dtype, M, N, D, 0))


def ranked(D: int, dtype: torch.dtype, where: torch.device) -> RetrievalConfig:
    """The tile of the top-k and the rank kernel, the same for every number of queries and items."""
    return cast(RetrievalConfig, choose("ranked", where, dtype, *RANKED_ROWS, D, 0))


def late_interaction(R: int, L: int, D: int, dtype: torch.dtype, where: torch.device) -> LateInteractionConfig:
    """The late-interaction kernel's tile for images of R regions and captions of L words."""
    return cast(LateInteractionConfig, choose("late_interaction", where, dtype, R, L, D, 0))


def cross_attention(R: int, L: int, D: int, dtype: torch.dtype, where: torch.device) -> CrossAttentionConfig:
    """The cross-attention kernel's tile for images of R regions and captions of L words."""
    return cast(CrossAttentionConfig, choose("cross_attention", where, dtype, R, L, D, 0))


def plan(batch: int, M: int, N: int, D: int, B: int, dtype: torch.dtype, where: torch.device) -> Plan:
    """The plan of S (batch, M, N): what `force_plan` says, else the tables', else the model's."""
    forced = forced_plan(M, N)
    return forced or cast(PlanChoice, choose("plan", where, dtype, M, N, D, B, batch)).resolve(M, N)


def gradient_plan(batch: int, M: int, N: int, D: int, B: int, dtype: torch.dtype, where: torch.device) -> Plan:
    """Whether the gradient's product R = P x is the library's ("fold_product") or in the gradient kernel."""
    forced = forced_plan(M, N)
    return forced or cast(PlanChoice, choose("gradient_plan", where, dtype, M, N, D, B, batch)).resolve(M, N)
