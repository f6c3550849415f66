"""The benchmark cannot rot: tiny sweeps, the results' schema, resuming, comparing, costs by hand, pictures.

No test here asserts a time.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

PERF = Path(__file__).resolve().parent.parent / "perf"
sys.path.insert(0, str(PERF))

import _cells  # noqa: E402
import _measure  # noqa: E402
import _operation  # noqa: E402
import _registry  # noqa: E402
import _results  # noqa: E402
import _timing  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402
from _costs import TABLE, Cost, cost  # noqa: E402

SHAPE = _cells.Shape(24, 40, 32, 8)
TINY = ["--device", "cpu", "--seconds", "0.01", "--contenders", "gssf,dense", "--shape", "24,24,32,8"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep._machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(sweep._machine.MATRIX_SIDE, "cpu", 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shapes with its pictures."""
    out = tmp_path_factory.mktemp("perf") / "device" / "full.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sweep._machine.COPY_BYTES, "cpu", 2**16)
        patch.setitem(sweep._machine.MATRIX_SIDE, "cpu", 32)
        assert sweep.main([*TINY, "--shape", "48,48,32,8", "--out", str(out)]) == 0
    return out


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mathematics", "mode", "flops", "bytes_"),
    [
        # M = 3, N = 5, D = 4, B = 2, fp32. S: 3·5·4 multiplies and adds, (12 + 20 + 15) numbers.
        ("cosine", "forward", 120, 4 * 47),
        # T folds 3 rows: each of 4 channels takes 2 multiply-adds for the block and 1 for the diagonal; 4 + 8 weights.
        ("gssf", "forward", 120 + 72, 4 * (47 + 12)),
        # Two more products; dS, a and b read, da and db written.
        ("cosine", "forward+backward", 360, 4 * (47 + 15 + 2 * 32)),
        # da and dW cost what T costs; the weights read again, their gradients written.
        ("gssf", "forward+backward", 360 + 3 * 72, 4 * (47 + 12 + 15 + 2 * (32 + 12))),
    ],
)
def test_costs_by_hand(mathematics: str, mode: str, flops: int, bytes_: int) -> None:
    assert cost(mathematics, mode, _cells.Shape(3, 5, 4, 2), 4) == Cost(flops, bytes_)


def test_folding_either_side_costs_the_same() -> None:
    for mathematics, mode in TABLE:
        assert cost(mathematics, mode, _cells.Shape(3, 5, 4, 2), 2) == cost(
            mathematics, mode, _cells.Shape(5, 3, 4, 2), 2
        )


def test_every_contender_has_a_cost() -> None:
    modes = set(_cells.PASSES)
    for operation in _registry.OPERATIONS.values():
        for contender in operation.contenders:
            assert {mode for mathematics, mode in TABLE if mathematics == contender.mathematics} == modes


# --- suites ----------------------------------------------------------------------------------------------------------


def test_full_suites_hold_the_shapes_asked_for() -> None:
    gpu = _cells.suite_cells("full", "cuda", ["pairwise_sim"])
    for M, N in ((512, 512), (2048, 2048), (8192, 8192), (32768, 32768), (64, 10**6)):
        for D in (256, 512, 1024):
            for B in (16, 32, 64, 128):
                shape = _cells.Shape(M, N, D, B)
                found = {(cell.dtype, cell.mode) for cell in gpu if cell.shape == shape}
                assert found == {(dtype, mode) for dtype in ("bf16", "fp32") for mode in _cells.PASSES}
    cpu = _cells.suite_cells("full", "cpu", ["pairwise_sim"])
    bar = _cells.Cell("pairwise_sim", "forward+backward", _cells.Shape(4096, 4096, 1024, 32), "fp32")
    assert bar in cpu


@pytest.mark.parametrize("key", sorted(_cells.SUITES), ids="-".join)
def test_keys_are_unique(key: tuple[str, str]) -> None:
    keys = [cell.key for cell in _cells.suite_cells(*key, ["pairwise_sim"])]
    assert len(keys) == len(set(keys))


def test_every_suite_offered_has_cells() -> None:
    assert set(_registry.suites()) == {suite for suite, _ in _cells.SUITES}
    assert all(_registry.members(suite) for suite in _registry.suites())


def test_plans_run_apart_on_a_gpu_only() -> None:
    cell = _cells.Cell("pairwise_sim", "forward", SHAPE, "fp32")
    on_gpu = {c.name for c in _registry.contenders_for(cell, "cuda")}
    on_cpu = {c.name for c in _registry.contenders_for(cell, "cpu")}
    assert on_gpu - on_cpu == {"gssf_one_pass", "gssf_fold_product"}


# --- a run -----------------------------------------------------------------------------------------------------------


def test_schema(finished: Path) -> None:
    run = json.loads(finished.read_text())
    assert run["schema"] == _results.SCHEMA
    assert run["complete"] and run["started"] <= run["finished"]
    assert run["device"]["type"] == "cpu" and run["device"]["name"]
    assert "driver" in run
    assert run["cpu"]["threads"] == torch.get_num_threads()
    assert run["versions"]["torch"] == torch.__version__
    assert {"python", "torch", "triton", "gssf_triton"} <= set(run["versions"])
    assert set(run["commit"]) == {"hash", "dirty"}
    for ceiling in (run["ceilings"]["copy_bytes_per_second"], run["ceilings"]["flops_per_second"]["fp32"]):
        assert 0 < ceiling["q1"] <= ceiling["median"] <= ceiling["q3"] <= ceiling["best"]
    assert list(run["cells"]) == run["planned"]
    assert len(run["cells"]) == 4
    for cell in run["cells"].values():
        assert list(cell["contenders"]) == ["cosine", "torch", "gssf", "dense"]
        shape = _cells.Shape(cell["M"], cell["N"], cell["D"], cell["B"])
        for name, entry in cell["contenders"].items():
            assert entry["status"] == "ok", entry["reason"]
            assert entry["error"] <= 1e-5
            work = cost("cosine" if name == "cosine" else "gssf", cell["mode"], shape, 4)
            assert (entry["flops"], entry["bytes"]) == (work.flops, work.bytes)
            assert entry["peak_bytes"] >= 4 * shape.M * shape.N
            for measure in ("seconds", "relative"):
                spread = entry[measure]
                assert 0 < spread["best"] <= spread["q1"] <= spread["median"] <= spread["q3"]
                assert spread["n"] >= 5
        assert cell["contenders"]["cosine"]["relative"]["median"] == 1


def test_pictures(finished: Path) -> None:
    for name in ("roofline", "relative-fp32", "memory-fp32"):
        png = finished.with_name(f"full-{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 10_000
        assert "<svg" in finished.with_name(f"full-{name}.svg").read_text(encoding="utf-8")[:2000]


def test_colour_and_marker_tell_contenders_apart() -> None:
    import _plots

    styles = [_plots.STYLE[name] for name in _registry.contender_names()]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles)


def test_half_precision_is_checked_and_timed() -> None:
    cell = _cells.Cell("pairwise_sim", "forward+backward", _cells.Shape(24, 16, 32, 8), "bf16", compiled=False)
    entries = _measure.measure(cell, torch.device("cpu"), _timing.Effort(2, 2, 0.0), seed=1, wanted=None)["contenders"]
    assert {name: entry["reason"] for name, entry in entries.items()} == dict.fromkeys(entries)
    assert all("seconds" in entry for entry in entries.values())


# --- no speed for a wrong result -------------------------------------------------------------------------------------


def _with_contender(monkeypatch: pytest.MonkeyPatch, contender: _operation.Contender) -> None:
    operation = _registry.OPERATIONS["pairwise_sim"]
    changed = dataclasses.replace(operation, contenders=(*operation.contenders, contender))
    monkeypatch.setitem(_registry.OPERATIONS, "pairwise_sim", changed)


@pytest.mark.parametrize("mode", _cells.PASSES)
def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    ours = next(c for c in _registry.OPERATIONS["pairwise_sim"].contenders if c.name == "gssf")

    def build(inputs: _operation.Inputs) -> _operation.Program:
        program = ours.build(inputs)
        correct = program.forward
        program.forward = lambda: correct() * 1.001
        return program

    _with_contender(monkeypatch, _operation.Contender("off", "off", build, mathematics="gssf", ours=True))
    cell = _cells.Cell("pairwise_sim", mode, SHAPE, "fp32", compiled=False)
    entries = _measure.measure(cell, torch.device("cpu"), _timing.Effort(2, 2, 0.0), seed=1, wanted=None)["contenders"]
    assert entries["off"]["status"] == "wrong"
    assert "seconds" not in entries["off"]
    assert entries["gssf"]["status"] == "ok"


def test_a_contender_that_cannot_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(inputs: _operation.Inputs) -> _operation.Program:
        raise MemoryError("too large for this machine")

    _with_contender(monkeypatch, _operation.Contender("big", "big", build, mathematics="gssf"))
    cell = _cells.Cell("pairwise_sim", "forward", SHAPE, "fp32", compiled=False)
    entries = _measure.measure(cell, torch.device("cpu"), _timing.Effort(2, 2, 0.0), seed=1, wanted=None)["contenders"]
    assert entries["big"]["status"] == "failed"
    assert "too large" in entries["big"]["reason"]
    assert "seconds" in entries["gssf"]


def test_a_nan_is_an_infinite_error() -> None:
    assert _operation.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


# --- time and memory -------------------------------------------------------------------------------------------------


def test_rounds_hold_every_contender_once() -> None:
    calls: list[str] = []
    samples = _timing.interleave(
        {name: lambda name=name: calls.append(name) for name in "ABC"}, _FakeClock(), _timing.Effort(4, 4, 0.0)
    )
    assert all(len(found) == 4 for found in samples.values())
    timed = calls[-12:]
    assert all(sorted(timed[i : i + 3]) == ["A", "B", "C"] for i in range(0, 12, 3))


class _FakeClock(_timing.CpuClock):
    def repeats(self, call: _timing.Call) -> int:
        return 1


def test_peak_memory_counts_what_was_held_at_once() -> None:
    def call() -> torch.Tensor:
        x = torch.ones(1000)  # 4,000 bytes
        y = x + 1  # 8,000
        del x
        return y * 2  # 8,000 again

    assert 8000 <= _timing.peak_bytes(call, torch.device("cpu")) < 9000


# --- interrupted and taken up again ----------------------------------------------------------------------------------


#: sweep.py in a process of its own, with ceilings that take no time.
SMALL_SWEEP = f"""
import sys
sys.path.insert(0, {str(PERF)!r})
import sweep
sweep._machine.COPY_BYTES["cpu"], sweep._machine.MATRIX_SIDE["cpu"] = 2**16, 32
sys.exit(sweep.main(sys.argv[1:]))
"""


def _cells_in(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["cells"]) if path.exists() else {}


def test_a_killed_run_keeps_its_cells_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    shapes = [part for n in (24, 32, 40, 48) for part in ("--shape", f"{n},40,32,8")]
    argv = ["--device", "cpu", "--contenders", "gssf", "--no-plots", "--out", str(out), *shapes]
    # Cells of a third of a second each: the kill falls between the first and the last.
    command = [sys.executable, "-c", SMALL_SWEEP, *argv, "--seconds", "0.3"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **threads}, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not _cells_in(out) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    kept = _cells_in(out)
    assert 1 <= len(kept) < 8
    assert not json.loads(out.read_text())["complete"]

    assert sweep.main([*argv, "--seconds", "0.3", "--resume", "--time-limit", "1e-6"]) == 0
    assert _cells_in(out) == kept  # no time left: nothing added, nothing lost

    fast = json.loads(out.read_text())
    fast["settings"]["seconds_a_cell"] = 0.01  # the rest of the cells need not take long
    out.write_text(json.dumps(fast))
    assert sweep.main([*argv, "--seconds", "0.01", "--resume"]) == 0
    after = json.loads(out.read_text())
    assert after["complete"] and len(after["cells"]) == 8
    assert {key: after["cells"][key] for key in kept} == kept


def test_resume_refuses_another_run(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = json.loads(finished.read_text())
    run["versions"]["torch"] = "0.1"
    out = tmp_path / "run.json"
    out.write_text(json.dumps(run))
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*TINY, "--out", str(out), "--resume"])
    assert stopped.value.code == 2
    assert "versions" in capsys.readouterr().err
    assert json.loads(out.read_text()) == run


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    _results.write(out, {"schema": 1})
    with pytest.raises(TypeError):
        _results.write(out, {"schema": object()})
    assert json.loads(out.read_text()) == {"schema": 1}
    assert list(tmp_path.iterdir()) == [out]


# --- compared --------------------------------------------------------------------------------------------------------


def _scaled(run: dict[str, Any], factor: float) -> dict[str, Any]:
    old = copy.deepcopy(run)
    for cell in old["cells"].values():
        for entry in cell["contenders"].values():
            for measure in ("seconds", "relative"):
                for name in ("median", "q1", "q3", "best"):
                    entry[measure][name] *= factor
    return old


@pytest.mark.parametrize(("factor", "status"), [(0.01, 1), (1.0, 0), (100.0, 0)], ids=["slower", "same", "faster"])
def test_compare_exit_status(
    finished: Path, tmp_path: Path, factor: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(_scaled(json.loads(finished.read_text()), factor)))
    argv = [*TINY, "--shape", "48,48,32,8", "--out", str(finished), "--resume", "--no-plots", "--compare", str(old)]
    assert sweep.main(argv) == status
    printed = capsys.readouterr().out
    assert "4 measurements compared" in printed
    assert printed.count("SLOWER") == (4 if status else 0)


def test_compare_knows_noise_from_change(finished: Path) -> None:
    new = json.loads(finished.read_text())
    for cell in new["cells"].values():
        cell["contenders"]["gssf"]["relative"] = {"median": 1.2, "q1": 1.0, "q3": 1.4, "best": 0.9, "n": 9}
    noisy, steady = copy.deepcopy(new), copy.deepcopy(new)
    for cell in noisy["cells"].values():  # median far off, quartiles that overlap
        cell["contenders"]["gssf"]["relative"] |= {"median": 0.9, "q1": 0.8, "q3": 1.1}
    for cell in steady["cells"].values():  # quartiles apart, a median that hardly moved
        cell["contenders"]["gssf"]["relative"] |= {"median": 1.15, "q1": 0.9, "q3": 0.99}
    assert _results.compare(noisy, new) == ([], 4)
    assert _results.compare(steady, new) == ([], 4)


def test_compare_tells_what_stopped_being_right(finished: Path) -> None:
    old = json.loads(finished.read_text())
    new = copy.deepcopy(old)
    next(iter(new["cells"].values()))["contenders"]["gssf"] |= {"status": "wrong", "reason": "relative error 1"}
    lines, _ = _results.compare(old, new)
    assert len(lines) == 1 and "wrong" in lines[0]


def test_compare_refuses_another_device(finished: Path) -> None:
    old = json.loads(finished.read_text())
    old["device"]["name"] = "another"
    with pytest.raises(ValueError, match="another"):
        _results.compare(old, json.loads(finished.read_text()))


@pytest.mark.parametrize(
    "argv",
    [["--shape", "1,2,3,2"], ["--shape", "1,2"], ["--contenders", "nobody"], ["--dtype", "fp32"], ["--suite", "none"]],
    ids=" ".join,
)
def test_bad_arguments(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*argv, "--device", "cpu"])
    assert stopped.value.code == 2


# --- README ----------------------------------------------------------------------------------------------------------


def test_readme_is_rendered_from_a_run(finished: Path) -> None:
    readme = finished.parent.parent / "README.md"
    readme.write_text(f"# head\n{report.BEGIN}\nold\n{report.END}\ntail\n", encoding="utf-8")
    argv = [str(finished), "--readme", str(readme)]
    assert report.main([*argv, "--check"]) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# head\n") and text.endswith("\ntail\n") and "old" not in text
    cell = json.loads(finished.read_text())["cells"]["pairwise_sim/forward/fp32/M48-N48-D32-B8"]
    row = next(line for line in text.splitlines() if line.startswith("| forward | fp32 | 48 × 48 | 32 | 8 |"))
    for name in ("gssf", "dense"):
        assert f" {cell['contenders'][name]['relative']['median']:.2f} |" in row
    for picture in finished.parent.glob("*roofline.png"):
        assert f"({picture.parent.name}/{picture.name})" in text


def test_readme_without_markers_is_left_alone(finished: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# no markers\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(finished), "--readme", str(readme)])
    assert stopped.value.code == 2
    assert readme.read_text(encoding="utf-8") == "# no markers\n"
