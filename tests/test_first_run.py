"""perf/first_run.py and perf/gpu_check.py, rehearsed: whole on a stubbed GPU, and what becomes of them in trouble.

The trouble comes from toy tasks, in processes that import nothing and start at once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import first_run
import pytest
from support.perf_kit import PERF

from bench import checkout
from bench.first import report

ROOT = PERF.parent
#: Folders that are carried to a machine on which nothing can be installed.
CARRIED = ("gssf_triton", "kernels", "autotune", "perf")

#: Seconds for the interpreter, on a machine where other tests run.
PATIENT = "2000"

#: A substitute for bench/first/tasks.py.
TOY_TASKS = """
import os, time

PLAN = {
    "ceilings": [[{"kind": "fine", "name": "one"}, {"kind": "fine", "name": "two"}]],
    "smoke": [
        [{"kind": kind, "name": kind} for kind in ("fine", "abort", "raises")] + [{"kind": "fine", "name": "after"}],
        [{"kind": "poisons", "name": "poisons"}, {"kind": "fine", "name": "after poison"}],
    ],
    "tiles": [[{"kind": "hangs", "name": "hangs"}, {"kind": "fine", "name": "after hang"}]],
    "calls": [[{"kind": "slow", "name": f"slow {i}"} for i in range(int(os.environ.get("SLOW", "0")))]],
}
healthy = True


def run(task):
    global healthy
    kind = task["kind"]
    with open(os.environ["TOY_PIDS"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    if kind == "environment":
        facts = {"device": {"name": os.environ.get("TOY_GPU", "toy")}, "versions": {}, "commit": {"hash": "c"},
                 "assembler": None}
        yield {"name": "environment", "ok": True, "facts": facts, "plan": PLAN}
    yield {"name": task["name"], "ok": True, "pid": os.getpid()}
    if kind == "abort":
        print("CUDA error: an illegal memory access, blocking", os.environ.get("CUDA_LAUNCH_BLOCKING", "0"), flush=True)
        os.abort()
    if kind == "raises":
        error = ValueError("no such tile")
        error.facts = {"call": "topk", "dtype": "bf16"}
        raise error
    if kind == "poisons":
        healthy = False
        raise RuntimeError("an illegal memory access")
    if kind == "hangs":
        time.sleep(60)
    if kind == "slow":
        time.sleep(0.2)


def is_healthy():
    return healthy
"""


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers find the toy tasks."""
    folder = tmp_path / "toys"
    first = folder / "bench/first"
    first.mkdir(parents=True)
    for package in (folder / "bench", first):
        (package / "__init__.py").touch()
    (first / "tasks.py").write_text(TOY_TASKS)
    shutil.copy(PERF / "bench/first/worker.py", first)
    monkeypatch.setattr(checkout, "PATH", (folder,))
    monkeypatch.setenv("TOY_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what is killed cannot clear up
    monkeypatch.setattr(first_run, "TASK_SECONDS", 1.0)
    return folder


def found_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "first_run.json").read_text(encoding="utf-8"))
    return found


def test_a_process_that_dies_or_hangs_costs_its_own_task(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert first_run.main(["--out", str(out), "--processes", "2"]) == 1
    stages = found_in(out)["stages"]
    assert {stage["status"] for stage in stages.values()} == {"done"}
    rows = {name: row for stage in stages.values() for name, row in stage["rows"].items()}
    right = {name for name, row in rows.items() if row["ok"]}
    assert right == {"environment", "one", "two", "fine", "after", "after poison", "after hang"}

    died = rows["abort"]["failure"]
    assert (died["outcome"], died["exit_status"]) == ("died", -signal.SIGABRT)
    assert died["last"][-1] == "CUDA error: an illegal memory access, blocking 0"
    again = died["blocking"]
    assert again["last"][-1].endswith("blocking 1") and again["rows"][0]["ok"]
    assert rows["after"]["pid"] not in (rows["fine"]["pid"], rows["abort"]["pid"])

    raised = rows["raises"]["failure"]
    assert raised["traceback"][-1] == "ValueError: no such tile" and len(raised["traceback"]) <= 12
    assert (raised["call"], raised["dtype"]) == ("topk", "bf16")
    # What a Python error leaves unusable is not used again.
    assert rows["poisons"]["failure"]["blocking"]["outcome"] == "died"
    assert rows["after poison"]["pid"] != rows["poisons"]["pid"]
    assert rows["hangs"]["failure"]["outcome"] == "late" and "blocking" not in rows["hangs"]["failure"]

    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("tiles: hangs") and "== 4 failures:" in printed
    assert (out / "table.txt").read_text(encoding="utf-8") == printed
    failures = (out / "failures.txt").read_text(encoding="utf-8")
    assert "with CUDA_LAUNCH_BLOCKING=1:" in failures and "ValueError: no such tile" in failures
    assert sorted(path.name for path in out.iterdir()) == [
        "failures.txt", "first_run.json", "first_run.log", "table.txt",
    ]  # fmt: skip
    assert not running(tmp_path / "pids")


def running(pids: Path) -> list[int]:
    """Processes that did tasks and are still there."""
    found = []
    for pid in {int(line) for line in pids.read_text().split()}:
        status = Path("/proc") / str(pid) / "stat"
        if status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(pid)
    return found


#: first_run.py with the toy worker, in a process that can be killed.
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {perf!r})
import first_run
first_run.checkout.PATH = (Path({toys!r}),)
sys.exit(first_run.main(sys.argv[1:]))
"""


def test_a_killed_run_keeps_its_rows_and_resumes(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SLOW", "200")
    command = [sys.executable, "-c", DRIVER.format(perf=str(PERF), toys=str(toys)), "--out", str(out)]
    options = ["--processes", "1", "--only", "ceilings", "calls"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while time.monotonic() < limit and process.poll() is None:
            written = (out / "first_run.json").exists()
            if written and len(found_in(out)["stages"].get("calls", {}).get("rows", {})) >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    held = found_in(out)
    assert held["stages"]["ceilings"]["status"] == "done" and held["stages"]["calls"]["status"] == "begun"
    assert 2 <= len(held["stages"]["calls"]["rows"]) < 200
    limit = time.monotonic() + 10
    while running(tmp_path / "pids") and time.monotonic() < limit:
        time.sleep(0.05)
    assert not running(tmp_path / "pids")
    assert len(list(out.iterdir())) <= 8

    monkeypatch.setenv("SLOW", "3")
    earlier = tmp_path / "earlier.json"
    shutil.move(out / "first_run.json", earlier)
    assert first_run.main(["--out", str(out), *options, "--resume", str(earlier)]) == 0
    after = found_in(out)["stages"]
    assert after["ceilings"] == held["stages"]["ceilings"] and len(after["calls"]["rows"]) == 3

    monkeypatch.setenv("TOY_GPU", "another")
    assert first_run.main(["--out", str(out), *options, "--resume"]) == 0
    assert "another device" in capsys.readouterr().err
    assert found_in(out)["stages"]["ceilings"] != held["stages"]["ceilings"]


def test_an_interrupted_run_ends_at_once_and_says_what_it_has(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("SLOW", "200")
    command = [sys.executable, "-c", DRIVER.format(perf=str(PERF), toys=str(toys)), "--out", str(out)]
    process = subprocess.Popen([*command, "--only", "calls"], stdout=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "pids").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and "== environment" in printed
    assert found_in(out)["stages"] and not running(tmp_path / "pids")


def test_a_stage_keeps_to_its_seconds(toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "50")
    monkeypatch.setattr(first_run, "STAGES", dict.fromkeys(first_run.STAGES, (0.5, 1)))
    out = tmp_path / "out"
    assert first_run.main(["--out", str(out), "--processes", "1", "--only", "calls"]) == 1
    calls = found_in(out)["stages"]["calls"]
    assert calls["status"].startswith("no time left for") and 0 < len(calls["rows"]) < 50
    assert first_run.main(["--out", str(out), "--processes", "1", "--budget", "0"]) == 1
    assert "no time left" in found_in(out)["stages"]["environment"]["status"]


def test_where_nothing_imports_that_is_said(toys: Path, tmp_path: Path) -> None:
    (toys / "bench/first/tasks.py").write_text("import a_module_that_is_missing")
    out = tmp_path / "out"
    assert first_run.main(["--out", str(out), "--processes", "1"]) == 1
    assert "No module named 'a_module_that_is_missing'" in (out / "failures.txt").read_text(encoding="utf-8")


def test_an_assembler_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        first_run.main(["--out", str(tmp_path), "--assembler", str(tmp_path / "ptxas")])
    assert refused.value.code == 2


# --- the whole of both programs on a stubbed GPU ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders as they are carried: no git, no installation."""
    checkout = tmp_path_factory.mktemp("carried") / "checkout"
    for name in CARRIED:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return checkout


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def rehearse(checkout: Path, tmp_path: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of perf/ in the carried checkout, and see that it writes nowhere but where it may."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    for folder in (home, scratch):
        folder.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GSSF", "TRITON", "XDG"))}
    environment |= {
        "PYTHONPATH": str(ROOT / "tests/rehearsal"), "HOME": str(home), "TMPDIR": str(scratch), "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1", "GSSF_COMMIT": "carried", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    before = listing(checkout)
    command = [sys.executable, str(checkout / "perf" / program), "--small", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600)
    assert listing(checkout) == before and not listing(home)
    # What the stub keeps and makes before the program begins; a process that is killed cannot clear up.
    left = {name.split("/")[0] for name in listing(scratch)}
    assert all(name.startswith(("gssf-stub-", "torchinductor_")) for name in left), left
    return done


@pytest.mark.kernels
def test_first_run_is_rehearsed(carried: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = rehearse(carried, tmp_path, "first_run.py", "--out", str(out), "--one-process", "--budget", PATIENT)
    found = found_in(out)
    assert list(found["stages"]) == list(first_run.STAGES), done.stderr
    failed = {row["name"]: row for _, row in report.failed(found)}
    # The stub's graphs replay nothing.
    assert failed.keys() == {"pairwise_sim, one pass, captured"}, (out / "failures.txt").read_text(encoding="utf-8")
    assert done.returncode == 1 and done.stdout.rstrip().endswith("repeat: pairwise_sim, one pass, captured")
    assert {stage["status"] for stage in found["stages"].values()} == {"done"}
    assert (found["device"]["name"], found["arch"], found["commit"]["hash"]) == ("NVIDIA H200", "sm_90", "carried")
    assert found["assembler"]["version"] and found["source"]
    for stage, least in (("compile", 30), ("smoke", 10), ("headline", 9), ("tiles", 6), ("calls", 3)):
        assert len(found["stages"][stage]["rows"]) >= least, stage
    smoked = found["stages"]["smoke"]["rows"].values()
    assert {kernel for row in smoked for kernel in row["kernels"]} >= {"fold", "pairwise", "stream", "gradient", "rank"}
    call = found["stages"]["calls"]["rows"]["info_nce, 32,768 × 1024: gssf"]
    assert {"seconds", "host_seconds", "wall_seconds", "peak_bytes", "apart"} <= call.keys()
    assert len(list(out.iterdir())) <= 8


#: What stands in for compute-sanitizer, which sees no kernel of the interpreter.
SANITIZER = "#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\n"


@pytest.mark.kernels
def test_gpu_check_is_rehearsed(carried: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    out = tmp_path / "out" / "check.json"
    done = rehearse(carried, tmp_path, "gpu_check.py", "--out", str(out), "--calls", "paired_sim", "--budget", PATIENT)
    steps = json.loads(out.read_text(encoding="utf-8"))["steps"]
    statuses = {name: step["status"] for name, step in steps.items()}
    # The stub's graphs replay nothing.
    assert statuses == dict.fromkeys(statuses, "ok") | {"graphs": "failed"}, done.stdout + done.stderr
    assert len(steps["errors"]["findings"]) == 4 and done.returncode == 1
    goals = json.loads(out.with_name("goals.json").read_text(encoding="utf-8"))
    assert goals["complete"] and {cell["operation"] for cell in goals["cells"].values()} >= {"info_nce", "topk"}
