"""A sweep's files cannot rot: the results' schema, pictures, resuming, comparing, README's tables.

No test here asserts a time.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import report
import sweep
import torch
from support.perf_kit import PERF, quick

from bench import cells, results
from bench.costs import cost

TINY = ["--device", "cpu", "--seconds", "0.01", "--contenders", "gssf,dense", "--shape", "24,24,32,8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two shapes with its pictures."""
    out = tmp_path_factory.mktemp("perf") / "device" / "full.json"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert sweep.main([*TINY, "--shape", "48,48,32,8", "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_results_are_not_those_of_the_repository_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "RUNS", tmp_path)
    assert sweep.main([*TINY, "--contenders", "gssf", "--no-plots"]) == 0
    (out,) = tmp_path.glob("*/custom.json")
    assert json.loads(out.read_text())["complete"]


def test_schema(finished: Path) -> None:
    run = json.loads(finished.read_text())
    assert run["schema"] == results.SCHEMA
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
        shape = cells.Shape(cell["M"], cell["N"], cell["D"], cell["B"])
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
        assert png.startswith(b"\x89PNG") and 3_000 < len(png) < 100_000


# --- interrupted and taken up again ----------------------------------------------------------------------------------


#: sweep.py in a process of its own, with ceilings that take no time.
SMALL_SWEEP = f"""
import sys
sys.path.insert(0, {str(PERF)!r})
import sweep
sweep.machine.COPY_BYTES["cpu"], sweep.machine.MATRIX_SIDE["cpu"] = 2**16, 32
sys.exit(sweep.main(sys.argv[1:]))
"""


def _cells_in(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())["cells"]) if path.exists() else {}


def test_a_killed_run_keeps_its_cells_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    shapes = [part for n in (24, 32, 40) for part in ("--shape", f"{n},40,32,8")]
    argv = ["--device", "cpu", "--contenders", "gssf", "--no-plots", "--out", str(out), *shapes]
    # Cells of half a second each: the kill falls between the first and the last.
    command = [sys.executable, "-c", SMALL_SWEEP, *argv, "--seconds", "0.15"]
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
    assert 1 <= len(kept) < 6
    assert not json.loads(out.read_text())["complete"]

    assert sweep.main([*argv, "--seconds", "0.15", "--resume", "--time-limit", "1e-6"]) == 0
    assert _cells_in(out) == kept  # no time left: nothing added, nothing lost

    fast = json.loads(out.read_text())
    fast["settings"]["seconds_a_cell"] = 0.01  # the rest of the cells need not take long
    out.write_text(json.dumps(fast))
    assert sweep.main([*argv, "--seconds", "0.01", "--resume"]) == 0
    after = json.loads(out.read_text())
    assert after["complete"] and len(after["cells"]) == 6
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
    results.write(out, {"schema": 1})
    with pytest.raises(TypeError):
        results.write(out, {"schema": object()})
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
    assert results.compare(noisy, new) == ([], 4)
    assert results.compare(steady, new) == ([], 4)


def test_compare_tells_what_stopped_being_right(finished: Path) -> None:
    old = json.loads(finished.read_text())
    new = copy.deepcopy(old)
    next(iter(new["cells"].values()))["contenders"]["gssf"] |= {"status": "wrong", "reason": "relative error 1"}
    lines, _ = results.compare(old, new)
    assert len(lines) == 1 and "wrong" in lines[0]


def test_compare_refuses_another_device(finished: Path) -> None:
    new = json.loads(finished.read_text())
    for change in ({"device": {**new["device"], "name": "another"}}, {"cpu": {**new["cpu"], "threads": 99}}):
        with pytest.raises(ValueError, match=r"another|99 threads"):
            results.compare({**new, **change}, new)


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
    marks = "\nstale\n".join(report.RESULTS_MARKS) + "\nkept\n" + "\nstale\n".join(report.COSTS_MARKS)
    readme.write_text(f"# head\n{marks}\ntail\n", encoding="utf-8")
    argv = [str(finished), "--readme", str(readme)]
    assert report.main([*argv, "--check"]) == 1
    assert report.main(argv) == 0
    assert report.main([*argv, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# head\n") and text.endswith("\ntail\n") and "stale" not in text and "\nkept\n" in text
    assert "| similarity | forward | 2·M·N·D + F |" in text
    cell = json.loads(finished.read_text())["cells"]["pairwise_sim/forward/fp32/M48-N48-D32-B8"]
    row = next(line for line in text.splitlines() if line.startswith("| forward | fp32 | 48 × 48 | 32 | 8 |"))
    for name in ("gssf", "dense"):
        assert f" {cell['contenders'][name]['relative']['median']:.2f} |" in row
    for picture in finished.parent.glob("*roofline.png"):
        assert f"({picture.parent.name}/{picture.name})" in text
    said = next(line for line in text.splitlines() if line.startswith("gssf_triton takes "))
    run = json.loads(finished.read_text())
    cells = {c["contenders"]["gssf"]["relative"]["median"]: c for c in run["cells"].values()}
    for ratio, words in ((min(cells), " of cosine's time"), (max(cells), "")):
        c = cells[ratio]
        assert f" {ratio:.2f}{words} at {c['M']} × {c['N']} ({c['mode']}, {c['dtype']})" in said


def test_readme_without_markers_is_left_alone(finished: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# no markers\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        report.main([str(finished), "--readme", str(readme)])
    assert stopped.value.code == 2
    assert readme.read_text(encoding="utf-8") == "# no markers\n"
