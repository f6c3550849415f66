"""What the tuner's tests share: a clock that stands still unless told, and devices that are not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gssf_triton.autotune import lookup
from gssf_triton.autotune.space import Key
from gssf_triton.autotune.tables import Entry
from gssf_triton.kernels import devices
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.devices import Device

CPU = torch.device("cpu")
H100 = Device("nvidia-h100-80gb-hbm3", "NVIDIA H100 80GB HBM3", "sm_90")
#: No table that ships is for it.
OTHER_GPU = Device("nvidia-gpu-of-tomorrow", "NVIDIA GPU of tomorrow", "sm_90")


class FakeClock:
    """Time passes only in the calls that are sampled: each takes what it returns, a number of seconds."""

    def __init__(self) -> None:
        self.time = 0.0
        self.samples = 0

    def now(self) -> float:
        return self.time

    def sample(self, call: Callable[[], Any]) -> float:
        self.samples += 1
        seconds = float(call())
        self.time += seconds
        return seconds


def stream_key(rows: int = 4096, D: int = 256) -> Key:
    return Key("chunk", "fp32", D, 0, rows, rows)


def measured(config: Any, seconds: float = 1e-3) -> Entry:
    return Entry(config, seconds, 0.01, "2.13.0", "3.9.0", "")


def a_chunk(rows: int = 512) -> Entry:
    return measured(ChunkConfig(rows, 2048))


@contextmanager
def pretend(patch: pytest.MonkeyPatch, device: Device) -> Iterator[None]:
    """Every look-up is for this device."""
    with patch.context() as inner:
        inner.setattr(devices, "identify", lambda where: device)
        inner.setattr(devices, "identify_for_torch", lambda where: device)
        lookup.forget()
        yield
    lookup.forget()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty user cache, and nothing remembered from before."""
    monkeypatch.setenv("GSSF_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("GSSF_AUTOTUNE", raising=False)
    monkeypatch.delenv("GSSF_AUTOTUNE_INTERPRETER", raising=False)
    lookup.forget()
    yield tmp_path / "autotune"
    lookup.forget()
