"""Outputs: whole or not at all, never over a device, a link or an input, with nothing left by whoever is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import first_run
import glyph_retrieval
import gpu_check
import numpy as np
import pytest
import report
import study_look
import study_reid
import study_runner
import sweep
import torch
from support.tuner_kit import CPU, a_chunk, cache, stream_key  # noqa: F401

from bench import results
from gssf_triton import storage
from gssf_triton.autotune import cli, lookup, rehearse
from gssf_triton.command import main
from gssf_triton.integrations.arrays import load_arrays, save_arrays
from gssf_triton.kernels.devices import identify_for_torch
from gssf_triton.storage import check_target, replacing


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


def put_array(path: Path) -> None:
    save_arrays(path, W_diag=torch.arange(3.0))


# ---------------------------------------------------------------- what stands in the place of a file


@pytest.mark.parametrize("kind", ["link", "hanging link", "link to a link", "link into a folder"])
def test_a_link_stays_and_its_target_is_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    target = tmp_path / ("other/real.npz" if kind == "link into a folder" else "real.npz")
    if kind != "hanging link":
        target.write_bytes(b"old")
    first = tmp_path / "first.npz"
    first.symlink_to(target)
    link = tmp_path / "second.npz" if kind == "link to a link" else first
    if link != first:
        link.symlink_to("first.npz")
    put_array(link)
    assert link.is_symlink() and not target.is_symlink()
    assert load_arrays(target)["W_diag"].tolist() == [0, 1, 2]
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".npz"] * (3 if link != first else 2)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_a_files_mode_is_kept_from_the_first_byte_on(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "private.json"
    path.write_bytes(b"old")
    path.chmod(mode)
    with replacing(path) as file:
        (scratch,) = (p for p in tmp_path.iterdir() if p != path)
        assert stat.S_IMODE(scratch.stat().st_mode) == mode
        file.write(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode and path.read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_every_new_file(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    time.sleep(0.1)
    put_array(pipe)
    reader.join(timeout=20)
    (tmp_path / "copy.npz").write_bytes(read[0])
    assert load_arrays(tmp_path / "copy.npz")["W_diag"].tolist() == [0, 1, 2]
    assert stat.S_ISFIFO(pipe.stat().st_mode) and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_that_nobody_reads_is_refused_and_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="nobody reads"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_devices_and_what_is_open_are_written_to_and_stay(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    write(Path("/dev/null"))
    assert (os.stat("/dev/null").st_rdev, os.stat("/dev/null").st_ino) == (before.st_rdev, before.st_ino)
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    with log.open("ab") as file:
        write(Path(f"/dev/fd/{file.fileno()}"), b"result\n")  # as --out /dev/stdout >> log does
        assert log.read_bytes() == b"before\nresult\n" and os.fstat(file.fileno()).st_ino == log.stat().st_ino


@pytest.mark.parametrize("kind", ["folder", "socket", "loop", "long", "below a file"])
def test_what_cannot_be_a_target_is_refused_before_anything_is_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "loop":
        path.symlink_to("x")
    elif kind == "long":
        path = tmp_path / ("é" * 128)
    else:
        path.write_bytes(b"")
        path = path / "y"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError):
        check_target(path)
    with pytest.raises(OSError), replacing(path):
        pytest.fail("the work began")
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_as_long_as_may_be(tmp_path: Path) -> None:
    for name in ("a" * 255, "二" * 85):
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"


def test_read_only_is_said_before_the_work() -> None:
    """By a user who is not root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").write_bytes(b"old")
        (folder / "a").chmod(0o444)
        for mode, path, wanted in ((0o777, "a", "cannot be written"), (0o555, "new", "cannot be written in")):
            folder.chmod(mode)
            child = os.fork()
            if not child:
                try:
                    if os.getuid() == 0:
                        os.setuid(65534)
                    check_target(folder / path)
                except PermissionError as fault:
                    os._exit(0 if fault.strerror == wanted else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, path
        folder.chmod(0o755)


# ---------------------------------------------------------------- writers that are killed


def in_a_child(path: Path, until: Callable[[], object]) -> int:
    """A forked process inside `replacing`; its number, once it has written."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            with replacing(path) as file:
                file.write(b"half")
                file.flush()
                os.write(told, b"x")
                until()
        finally:
            os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return child


def test_the_next_writer_removes_what_killed_ones_left(tmp_path: Path) -> None:
    for name in ("run.pt", "run.pt", "other.pt"):
        child = in_a_child(tmp_path / name, lambda: time.sleep(60))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert 1 <= len(list(tmp_path.iterdir())) <= 3
    write(tmp_path / "run.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_living_writers_file_stays_and_takes_its_place_at_the_end(tmp_path: Path) -> None:
    goes_on, end = os.pipe()
    child = in_a_child(tmp_path / "run.pt", lambda: os.read(goes_on, 1))
    os.utime(next(tmp_path.iterdir()), (1, 1))  # however long it has taken already
    for _ in range(3):
        write(tmp_path / "run.pt")
    assert len(list(tmp_path.iterdir())) == 2
    os.write(end, b"x")
    os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    assert (tmp_path / "run.pt").read_bytes() == b"half"


def test_another_machines_file_is_removed_only_once_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a writer elsewhere may not be seen here."""
    with monkeypatch.context() as patch:
        patch.setattr(storage.platform, "node", lambda: "elsewhere")
        child = in_a_child(tmp_path / "run.pt", lambda: time.sleep(60))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    write(tmp_path / "run.pt")
    assert left.exists()
    os.utime(left, (time.time() - 3700, time.time() - 3700))
    write(tmp_path / "run.pt")
    assert not left.exists()


def test_a_disk_without_locks_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    child = in_a_child(tmp_path / "run.pt", lambda: time.sleep(60))
    write(tmp_path / "run.pt")
    assert len(list(tmp_path.iterdir())) == 2, "who lives cannot be told there"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_threads_that_write_one_file_at_once(tmp_path: Path) -> None:
    """Each looks for what others left while these write: none may be taken for left over."""

    def work(letter: bytes) -> None:
        for _ in range(100):
            write(tmp_path / "x", letter * 1000)

    faults: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda told: faults.append(told.exc_value))
        threads = [threading.Thread(target=work, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and len(set((tmp_path / "x").read_bytes())) == 1


# ---------------------------------------------------------------- an output that is an input


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.eye(4, dtype=np.float32))
    np.save("ids.npy", np.arange(4) // 2)
    np.savez("metric.npz", W_diag=np.ones(4, np.float32))
    Path("images").mkdir()
    for i in range(4):
        Image.new("RGB", (9, 9)).save(f"images/{i}.png")
    Path("list.txt").write_text("".join(f"images/{i}.png\n" for i in range(4)))
    Path("texts.txt").write_text("a\nb\nc\nd\n")
    return tmp_path


SEARCH = "search x.npy x.npy --weights metric.npz --texts texts.txt --images list.txt --gallery-ids ids.npy"


@pytest.mark.parametrize("way", ["same", "dotted", "link", "hard link"])
@pytest.mark.parametrize("read", ["x.npy", "ids.npy", "metric.npz", "list.txt", "texts.txt", "images/2.png"])
def test_no_output_overwrites_what_is_read(
    read: str, way: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(read).read_bytes()
    out = {"same": read, "dotted": f"images/../{read}"}.get(way, "out.png")
    if way == "link":
        Path(out).symlink_to(read)
    elif way == "hard link":
        os.link(read, out)
    options = [("--out", out)] + ([("--sheet", out)] if out.endswith(".png") else [])
    for option in options:
        assert main([*SEARCH.split(), *option]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"gssf-triton search: {option[0]}: {out}: expected a file of its own"), said
        assert said.count("\n") == 1
    assert Path(read).read_bytes() == before
    if read in ("x.npy", "ids.npy", "metric.npz"):
        command = "evaluate retrieval x.npy --labels ids.npy --weights metric.npz --out"
        assert main([*command.split(), out]) == 2
        assert Path(read).read_bytes() == before


def test_a_command_onto_a_link_a_pipe_and_an_open_file(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "retrieval", "x.npy", "--labels", "ids.npy", "--cosine", "--quiet", "--out"]
    Path("link.csv").symlink_to("real.csv")
    assert main([*command, "link.csv"]) == 0
    assert Path("link.csv").is_symlink() and Path("real.csv").read_text().startswith("metric,value\n")
    os.mkfifo("pipe")
    assert main([*command, "pipe"]) == 2
    assert "--out: pipe cannot be written (is a pipe that nobody reads)" in capfd.readouterr().err
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert main([*command, "/dev/stdout"]) == 0
    assert json.loads(capfd.readouterr().out)["r1"] == 50  # all tie: the first two find each other


# ---------------------------------------------------------------- the other programs


def refused(program: Callable[[list[str]], object], *argv: str) -> str:
    """The one line that a program ends with before its work."""
    with pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr(sys, "stderr", said)
        with pytest.raises(SystemExit) as stopped:
            program([*argv])
    assert stopped.value.code == 2
    return said.getvalue().splitlines()[-1]


def test_programs_refuse_before_their_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("file").write_bytes(b"")
    Path("first/table.txt").mkdir(parents=True)
    run = dict.fromkeys(results.RUN, 1)
    results.write(Path("old.json"), run)
    before = Path("old.json").read_bytes()
    monkeypatch.setattr(sweep, "measure_all", lambda *_: pytest.fail("the work began"))
    small = ("--small", "--device", "cpu", "--no-plots")
    assert "--out: pipe is no file" in refused(sweep.main, "--out", "pipe", *small)
    assert "--out: first is a folder" in refused(sweep.main, "--out", "first", *small)
    Path("link.json").symlink_to("old.json")
    assert "one that is read: old.json" in refused(sweep.main, "--out", "link.json", "--compare", "old.json", *small)
    assert Path("old.json").read_bytes() == before
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "--out: pipe is no file" in refused(gpu_check.main, "--out", "pipe", "--device", "cpu")
    assert "/file is no folder to write in" in refused(gpu_check.main, "--out", "file/x.json", "--device", "cpu")
    assert "old.json: expected a file of its own" in refused(
        report.main, "old.json", "--readme", str(tmp_path / "old.json")
    )
    assert "a pipe" in refused(report.main, "old.json", "--readme", "pipe")
    assert "--out: file is no folder" in refused(first_run.main, "--out", "file")
    assert "--out: first/table.txt is no file" in refused(first_run.main, "--out", "first")
    assert "--out: first is a folder" in refused(rehearse.main, "--out", "first")
    for program in (glyph_retrieval.main, lambda argv: study_runner.main(study_reid.STUDY, argv), study_look.main):
        assert str(tmp_path / "file") in refused(program, "--out", "file")
    Path("out/both-0.pt").parent.mkdir()
    Path("out/both-0.pt").write_bytes(b"teacher")
    student = ("--loss", "distillation", "--teacher", "out/both-0.pt", "--out", "out")
    for more in (("--metric", "both"), ("--metric", "diag", "--fresh")):
        assert "one that is read: out/both-0.pt" in refused(glyph_retrieval.main, *student, *more)
    assert Path("out/both-0.pt").read_bytes() == b"teacher"


def test_a_fresh_demo_removes_its_own_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("both-0.pt", "diag-7.pt", "thesis.tex", "both.pt"):
        (tmp_path / name).write_bytes(b"x")

    def stop(*_: object) -> None:
        raise ValueError("begun")

    monkeypatch.setattr(glyph_retrieval, "load_glyphs", stop)
    assert glyph_retrieval.main(["--out", str(tmp_path), "--fresh"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.pt", "thesis.tex"]


def test_an_export_in_the_place_of_the_cache(
    cache: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    lookup.learn(identify_for_torch(CPU), {stream_key(): a_chunk()})
    path = lookup.store_for(identify_for_torch(CPU)).path
    assert path is not None
    before = path.read_bytes()
    assert "expected a file of its own" in refused(cli.main, "export", "--device", "cpu", "--out", str(path))
    assert path.read_bytes() == before
    (cache / "link.json").symlink_to("table.json")
    assert cli.main(["export", "--device", "cpu", "--out", str(cache / "link.json")]) == 0
    assert (cache / "link.json").is_symlink() and "entries" in (cache / "table.json").read_text("utf-8")
