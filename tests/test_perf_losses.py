"""The losses' benchmark: every contender computes the same loss, and ours stays within the error it may have."""

from __future__ import annotations

from pathlib import Path

import pytest
import report
import sweep
import torch
from support.perf_kit import quick

from bench.cells import Cell, Shape, grid
from bench.measure import measure
from bench.operations import loss_peers
from bench.registry import OPERATIONS
from bench.timing import BRIEF


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.mark.parametrize("loss", ["info_nce", "sigmoid_loss", "triplet_loss", "distillation_loss"])
def test_losses_and_their_peers_agree_with_float64(loss: str) -> None:
    """Ours within its bar, every peer the same loss: only rounding tells them apart."""
    shape = OPERATIONS[loss].shape(Shape.of(70, 70, 64, 16))
    for dtype in ("fp32", "bf16"):
        cell = Cell(loss, "forward+backward", shape, dtype, compiled=False, once=True)
        contenders = measure(cell, torch.device("cpu"), BRIEF, 0, None)["contenders"]
        assert {"torch", "gssf"} <= contenders.keys()
        for name, entry in contenders.items():
            assert entry["status"] == "ok", f"{name}: {entry['reason']}"
            assert entry["seconds"]["n"] == 1 and (dtype != "fp32" or entry["error"] <= 1e-5)
        assert contenders["gssf"]["error"] <= OPERATIONS[loss].bars[dtype]


def test_the_ideal_peer_computes_the_same_loss() -> None:
    """Its own autograd Function, without the compiler that makes it fast."""
    t, y = (torch.randn(20, 8, dtype=torch.float64, requires_grad=True) for _ in "ty")
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ideal = loss_peers._Shared.apply(t, y, scale, loss_peers._log_sum_exps, loss_peers._shared_slope)
    stored = loss_peers.info_nce(t, y, scale)
    torch.testing.assert_close(ideal, stored, check_dtype=False)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (t, y, scale)) for loss in (ideal, stored)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_where_s_does_not_fit_only_those_run_that_never_store_it() -> None:
    cell = Cell("info_nce", "forward+backward", Shape.of(50, 50, 64, 16), "fp32", stored=False)
    contenders = measure(cell, torch.device("cpu"), BRIEF, 0, None)["contenders"]
    assert list(contenders) == ["gssf"]
    assert contenders["gssf"]["seconds"]["n"] == 1 and contenders["gssf"]["peak_bytes"] > 0


def test_errors_are_drawn_and_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From two sizes, and one where only ours runs: the pictures, and README's tables."""
    for name in [name for name in OPERATIONS if name != "info_nce"]:
        monkeypatch.delitem(OPERATIONS, name)
    cells = grid("info_nce", [Shape(N, N, 64, 32) for N in (48, 64)], "fp32", compiled=[])
    cells += grid("info_nce", [Shape(96, 96, 64, 32)], "fp32", modes=("forward+backward",), stored=False)
    monkeypatch.setattr(sweep, "suite_cells", lambda *_: cells)
    out = tmp_path / "device" / "losses.json"
    arguments = ["--suite", "losses", "--device", "cpu", "--seconds", "0.01", "--contenders", "gssf"]
    assert sweep.main([*arguments, "--out", str(out)]) == 0
    drawn = {path.stem for path in out.parent.glob("*.png")}
    assert drawn == {f"losses-{kind}" for kind in ("errors-fp32", "memory-fp32", "relative-fp32", "roofline")}
    marks = "\n".join(report.RESULTS_MARKS)
    text = report.render(marks, [out], tmp_path / "README.md")
    assert "errors-fp32.png" in text and "memory-fp32.png" in text and "roofline" not in text
    (alone,) = (line for line in text.splitlines() if line.startswith("| forward+backward | fp32 | 96 × 96"))
    assert f"| {report.UNRELATED} |" in alone and " MiB |" in alone and "no ratio of times" in text
    errors = text.split("largest relative error")[1]
    assert errors.count("| fp32 |") == 2 and "| 1e-05 |" in errors
