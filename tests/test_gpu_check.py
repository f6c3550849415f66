"""perf/gpu_check.py, as far as it runs without a GPU: its parts, its file, and that it can fail."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_check
import pytest
import torch

from bench import processes
from bench.check import calls, programs, steps
from bench.check.errors import Finding, finding
from bench.check.programs import Step
from bench.check.steps import Machine

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.kernels


@pytest.fixture
def machine(device: str) -> Machine:
    return Machine(torch.device(device), deadline=float("inf"))


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The steps with these calls alone."""
    monkeypatch.setattr(steps, "CALLS", [call for call in calls.CALLS if call.name in names])


def check(device: str, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    status = gpu_check.main(["--device", device, "--out", str(out), *arguments])
    return status, json.loads(out.read_text(encoding="utf-8"))


def test_every_kernel_of_the_package_is_launched(tmp_path: Path, device: str) -> None:
    written = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+)_kernel\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert written == set(calls.KERNELS)
    status, run = check(device, tmp_path / "check.json", "--only", "launched", "--small")
    assert status == 0, run["steps"]
    assert run["steps"]["launched"]["findings"][-1]["missing"] == []


def test_a_kernel_that_is_not_launched_is_missed(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    only(monkeypatch, "paired_sim")
    *_, last = steps.launched(machine)
    assert not last["ok"] and "pairwise" in last["missing"]


def test_errors_are_within_the_contract_in_every_numerics(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    only(monkeypatch, "paired_sim", "topk")
    found = list(steps.errors(machine))
    assert len(found) == 2 * 4 and all(f["ok"] for f in found), found


@pytest.mark.parametrize("call", ["transform", "ranks"])
def test_an_error_is_seen(call: str, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    only(monkeypatch, call)
    right = calls.Problem.results

    def wrong(problem: calls.Problem, backend: str) -> dict[str, torch.Tensor]:
        found = right(problem, backend)
        if backend == "triton":
            found["out"].view(-1)[3] += 1
        return found

    monkeypatch.setattr(calls.Problem, "results", wrong)
    assert not any(f["ok"] for f in steps.errors(machine))


def test_bits_that_differ_are_seen(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    only(monkeypatch, "paired_sim")
    assert [f["ok"] for f in steps.determinism(machine)] == [True]
    right = calls.Problem.results
    noise = iter([0.0, 1e-7, 0.0])

    def restless(problem: calls.Problem, backend: str) -> dict[str, torch.Tensor]:
        return {name: x + next(noise, 0.0) if name == "out" else x for name, x in right(problem, backend).items()}

    monkeypatch.setattr(calls.Problem, "results", restless)
    assert [f["differing"] for f in steps.determinism(machine)] == [1]


def good(machine: Machine) -> Iterator[Finding]:
    yield finding("good", True)


def broken(machine: Machine) -> Iterator[Finding]:
    yield finding("before", True)
    raise RuntimeError("in the middle")


def test_a_step_that_breaks_off_stops_no_other(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_check, "STEPS", {"one": Step(broken, 9), "two": Step(good, 9), "three": Step(good, 9, needs_gpu=True)}
    )
    out = tmp_path / "check.json"
    status, run = check(device, out, "--only", "one", "two", "three")
    assert status == 1
    assert run["steps"]["one"]["status"] == "RuntimeError: in the middle" and len(run["steps"]["one"]["findings"]) == 1
    assert run["steps"]["two"]["status"] == "ok" and run["steps"]["three"]["status"] == (
        "needs a GPU" if device == "cpu" else "ok"
    )

    ran: list[str] = []

    def mended(machine: Machine) -> Iterator[Finding]:
        ran.append("one")
        yield from good(machine)

    def again(machine: Machine) -> Iterator[Finding]:
        raise AssertionError("done already")
        yield

    monkeypatch.setattr(gpu_check, "STEPS", {"one": Step(mended, 9), "two": Step(again, 9)})
    status, run = check(device, out, "--only", "one", "two", "--resume")
    assert status == 0 and ran == ["one"] and list(run["steps"]) == ["two", "one"]


def test_another_machines_file_is_not_resumed(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STEPS", {"one": Step(good, 9)})
    out = tmp_path / "check.json"
    _, run = check(device, out, "--only", "one")
    out.write_text(json.dumps(run | {"versions": {"torch": "1.0"}}), encoding="utf-8")
    with pytest.raises(SystemExit) as refused:
        check(device, out, "--resume", "--only", "one")
    assert refused.value.code == 2


def test_a_program_whose_time_is_up_says_what_it_knows_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted, and killed where it does not end: neither it nor what it started runs on beside the next step."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    child = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    program = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where this was started in the background, it is ignored
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("told", flush=True)
"""
    done, output = processes.output([sys.executable, "-c", program], 3.0, {})
    assert done is None and not processes.RUNNING and output.split() == ["begun", "told"]
    # The child may take a moment to be gone, and stays listed where nobody waits for it.
    status = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    limit = time.monotonic() + 10
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < limit:
        time.sleep(0.05)
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"
    assert processes.output([sys.executable, "-c", "print(3); exit(7)"], 30.0, {}) == (7, "3\n")


def test_parts_make_up_the_whole(machine: Machine, tmp_path: Path, device: str) -> None:
    parts = [dataclasses.replace(machine, part=(i, 3)).calls for i in range(3)]
    assert sorted(call.name for part in parts for call in part) == sorted(call.name for call in calls.CALLS)
    for wrong in ("3/3", "-1/2", "1"):
        with pytest.raises(SystemExit):
            check(device, tmp_path / "check.json", "--part", wrong)


#: A stand-in for compute-sanitizer: what it prints of a program, and its exit status.
SANITIZER = """#!/bin/sh
echo "$@" >> {log}
cat <<'END'
{printed}
END
exit {status}
"""


@pytest.mark.parametrize(
    ("printed", "status", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, {"ok": True, "reports": ["0 errors"]}),
        (
            "========= Invalid __global__ read of size 4 bytes\n=========     at fold_kernel\n"
            "========= ERROR SUMMARY: 1 error",
            9,
            {"ok": False, "reports": ["1 error"], "found": ["Invalid __global__ read of size 4 bytes"]},
        ),
        ("========= Error: Device not supported", 1, {"ok": False, "reason": "compute-sanitizer does not work here"}),
    ],
    ids=["clean", "error", "unsupported"],
)
def test_a_sanitizers_words_are_kept(
    printed: str,
    status: int,
    expected: dict[str, Any],
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    program.write_text(SANITIZER.format(printed=printed, status=status, log=log))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    # What it watches runs once without it.
    monkeypatch.setattr(sys, "executable", "/bin/true")
    (found,) = programs.memcheck(machine)
    assert found.items() >= expected.items(), found
    assert "--tool memcheck" in log.read_text() and "--only launched" in log.read_text()


def test_no_time_left_is_said(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STEPS", {"one": Step(good, 9)})
    status, run = check(device, tmp_path / "check.json", "--only", "one", "--budget", "0")
    assert status == 1 and run["steps"]["one"]["status"] == "no time left"
