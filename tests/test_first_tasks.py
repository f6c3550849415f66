"""What first_run.py's processes do: a fault is reported with what finds it, and what is only compiled is not run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import gssf_triton
from bench import checkout, processes
from bench.check import calls
from bench.check.errors import where_wrong
from bench.check.watch import watched
from bench.first import cases, tasks
from bench.first.report import failures_text

pytestmark = pytest.mark.kernels


def task(device: str, kind: str, **facts: Any) -> dict[str, Any]:
    return {"kind": kind, "name": kind, "device": device, "small": True, **facts}


def test_a_wrong_result_is_reported_with_its_place_and_its_launches(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    right = calls.Problem.results

    def wrong(problem: calls.Problem, backend: str) -> dict[str, torch.Tensor]:
        found = right(problem, backend)
        if backend == "triton":
            found["out"][3::16, 5] += 100
        return found

    monkeypatch.setattr(calls.Problem, "results", wrong)
    asked = task(device, "smoke", call="pairwise_sim, one pass", numerics="fp32")
    (row,) = tasks.run(asked)
    assert not row["ok"] and row["of"] == "out" and "pairwise" in row["kernels"]
    failure = row["failure"]
    assert (failure["call"], failure["dtype"]) == ("pairwise_sim, one pass", "fp32")
    assert failure["tensors"]["a"]["mod 16"] == [n % 16 for n in failure["tensors"]["a"]["shape"]]
    place = failure["where"]["out"]
    assert place["rows"]["mod 16"] == [3] and place["columns"]["mod 64"] == [5] and place["nan"] == 0
    launch = next(launch for launch in failure["launches"] if launch["kernel"] == "pairwise")
    assert launch["config"]["BLOCK_M"] and launch["config"]["num_warps"] and launch["sizes"]["M"] == 35
    assert launch["signature"]["a.ptr"].startswith("*float32") and "BLOCK_M" not in launch["signature"]
    stages = {"smoke": {"status": "done", "seconds": 1.0, "rows": {row["name"]: row}}}
    text = failures_text({"stages": stages})
    for said in ("pairwise_sim, one pass", '"mod 16": [3]', '"wrong_share"', '"signature"', '"BLOCK_M"'):
        assert said in text


def test_an_error_carries_what_was_launched(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    right = calls.Problem.results

    def breaks(problem: calls.Problem, backend: str) -> dict[str, torch.Tensor]:
        found = right(problem, backend)
        if backend == "triton":
            raise RuntimeError("too many resources")
        return found

    monkeypatch.setattr(calls.Problem, "results", breaks)
    asked = task(device, "smoke", call="transform", numerics="bf16")
    with pytest.raises(RuntimeError, match="too many resources") as raised:
        list(tasks.run(asked))
    facts = raised.value.facts  # type: ignore[attr-defined]
    assert (facts["call"], facts["dtype"]) == ("transform", "bf16")
    assert {launch["kernel"] for launch in facts["launches"]} == {"fold", "gradient"}


@pytest.mark.parametrize("shape", [(), (7,), (40, 33), (3, 40, 33)], ids=str)
def test_a_right_result_is_wrong_nowhere(shape: tuple[int, ...]) -> None:
    exact = torch.randn(shape, dtype=torch.float64)
    found = where_wrong(exact.float(), exact, 1e-6)
    assert found["wrong_share"] == 0 and "columns" not in found


def test_numbers_that_are_none_are_counted() -> None:
    exact = torch.ones(64, 32)
    exact[0, 0] = float("inf")
    found = exact.clone()
    found[8:16, 31] = float("nan")
    facts = where_wrong(found, exact, 1e-3)
    assert (facts["nan"], facts["inf"]) == (8, 1) and facts["wrong_share"] == 8 / (64 * 32)
    assert facts["columns"]["mod 8"] == [7] and facts["rows"]["mod 64"] == list(range(8, 16))
    assert facts["largest_error"] == float("inf") and facts["at"][1] == 31
    assert where_wrong(found, exact.T, 1e-3) == {"shape": [64, 32], "wanted": [32, 64]}


def test_what_is_only_compiled_is_not_run(device: str) -> None:
    x, W_diag = torch.randn(8, 32, device=device), torch.ones(32, device=device)
    with watched(launch=False) as launches:
        T = gssf_triton.transform(x, W_diag, backend="triton")
    assert not T.any() and [launch["kernel"] for launch in launches] == ["fold"]
    with watched() as launches:
        T = gssf_triton.transform(x, W_diag, backend="triton")
        gssf_triton.transform(x, W_diag, backend="triton")
    torch.testing.assert_close(T, x)
    assert [launch["kernel"] for launch in launches] == ["fold"]


def test_every_planned_task_is_of_a_kind_and_says_what() -> None:
    for small in (False, True):
        plan = tasks.plan(small)
        planned = [task for groups in plan.values() for group in groups for task in group]
        assert {task["kind"] for task in planned} | {"environment"} == set(tasks.KINDS)
        for stage, groups in plan.items():
            names = [task["name"] for group in groups for task in group if stage != "compile"]
            assert len(names) == len(set(names)), stage
    assert all(len(tiles) == len(set(tiles)) == 10 for tiles in cases.TILES.values())


def test_a_kernel_left_to_torch_is_no_failure(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def refused(place: cases.Place) -> cases.Bench:
        raise RuntimeError("fold_kernel is not launched: ptxas 12.8 may overwrite operands")

    name = next(iter(cases.HEADLINE["rows"]))
    monkeypatch.setitem(cases.HEADLINE["rows"], name, refused)
    (row,) = tasks.run(task(device, "headline", of=name, group="rows"))
    assert row["ok"] and "ptxas 12.8" in row["reason"]
    monkeypatch.setitem(cases.HEADLINE["rows"], name, lambda place: [][0])
    with pytest.raises(IndexError):
        list(tasks.run(task(device, "headline", of=name, group="rows")))


def test_a_worker_imports_nothing_from_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise ImportError('not this one')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    log = io.StringIO()
    worker = processes.Worker(checkout.environment(tmp_path / "caches"), log)
    try:
        assert "ready" in (worker.messages.get(timeout=120) or {}), log.getvalue()
    finally:
        worker.end()
