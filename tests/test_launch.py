"""Every kernel starts on the device that holds its tensors, whichever is current."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType

import pytest
import torch

import gssf_triton

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
    launch(Kernel(), (3, 2), torch.device("cuda:1"), x_ptr=1)
    launch(Kernel(), (4,), torch.device("cpu"), x_ptr=2)
    assert started == [((3, 2), {"x_ptr": 1}, "cuda:1"), ((4,), {"x_ptr": 2}, "cuda:0")] and current == ["cuda:0"]


def test_no_kernel_starts_otherwise() -> None:
    sources = {path.name: path.read_text("utf-8") for path in KERNELS.glob("*.py")}
    launched = {name for name, text in sources.items() if re.search(r"\blaunch\(\n? *\w+_kernel", text)}
    written = {name for name, text in sources.items() if re.search(r"^def \w+_kernel\(", text, re.MULTILINE)}
    assert launched == written and len(written) == 9
    assert not [name for name, text in sources.items() if re.search(r"_kernel\[", text)]


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
