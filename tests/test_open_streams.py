"""Results into what a process has open, such as /dev/stdout redirected to a file: whole, in their place, and alone."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gpu_check
import numpy as np
import pytest
import sweep
from support.tuner_kit import CPU, a_chunk, cache, stream_key  # noqa: F401
from test_outputs import folder, refused, write  # noqa: F401

from gssf_triton.autotune import cli, lookup, rehearse
from gssf_triton.autotune.tables import parse
from gssf_triton.command import main
from gssf_triton.kernels.devices import identify_for_torch
from gssf_triton.storage import check_target, replaceable


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}", "link", "folder/{}"])
def test_what_this_process_has_open_is_written_to_where_it_stands(name: str, tmp_path: Path) -> None:
    """Opened anew a file would have an offset of its own, and what comes next would lie over what was written."""
    (tmp_path / "folder").symlink_to("/dev/fd")
    with (tmp_path / "found").open("wb", buffering=0) as file:
        (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
        target = tmp_path / name.format(file.fileno())
        file.write(b"before\n")
        write(target, b"result\n")
        file.write(b"after\n")
        assert (tmp_path / "found").read_bytes() == b"before\nresult\nafter\n" and not replaceable(target)
    with pytest.raises(OSError, match="is closed"):
        check_target(target)
    one, other = socket.socketpair()
    with one, other:  # such is the standard output of many services; it cannot be opened anew
        write(Path(f"/dev/fd/{one.fileno()}"), b"result")
        assert other.recv(99) == b"result"
    with (tmp_path / "found").open("rb") as file, pytest.raises(PermissionError, match="reading alone"):
        check_target(Path(f"/dev/fd/{file.fileno()}"))


@contextmanager
def redirected(**names: str) -> Iterator[None]:
    """Standard streams into files, as a shell does it."""
    numbers = {"stdout": 1, "stderr": 2}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for stream, name in names.items():
            kept = os.dup(numbers[stream])
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, numbers[stream])
            file = stack.enter_context(open(name, "w", encoding="utf-8"))
            os.dup2(file.fileno(), numbers[stream])
            opened = stack.enter_context(os.fdopen(numbers[stream], "w", encoding="utf-8", closefd=False))
            patch.setattr(sys, stream, opened)
        yield


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("out", ["/dev/stdout", "/dev/stderr", "link", "pipe"])
def test_results_among_what_is_printed(
    out: str,
    folder: Path,  # noqa: F811
) -> None:
    """The other stream has the notes and warnings; /dev/stdout may be a pipe, too."""
    taken = "stderr" if out == "/dev/stderr" else "stdout"
    if out == "link":
        Path("link").symlink_to("/dev/stdout")
    elif out == "pipe":
        os.mkfifo("found")
        read = []
        reader = threading.Thread(target=lambda: read.append(Path("found").read_text("utf-8")))
        reader.start()
        out = "/dev/stdout"
    x = np.eye(4, dtype=np.float32)
    x[3] = np.nan
    np.save("x.npy", x)
    sheet = ["--images", "images", "--sheet", "sheet.html"]
    with redirected(**{"stdout": "other", "stderr": "other"} | {taken: "found"}):
        assert main(["search", "x.npy", "x.npy", "--cosine", "-k", "1", *sheet, "--out", out]) == 0
    if not Path("found").is_file():
        reader.join(20)
        Path("found").unlink()
        Path("found").write_text(read[0], "utf-8")
    assert [row["query"] for row in json.loads(Path("found").read_text("utf-8"))] == [0, 1, 2, 3]
    said = Path("other").read_text("utf-8")
    assert "warning: " in said and ("results: " in said) == ("sheet: " in said) == (taken == "stdout")


def test_a_closed_standard_output_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was opened next has its number."""
    monkeypatch.setattr(sys, "__stdout__", None)
    with pytest.raises(OSError, match="is closed"):
        check_target(Path("/dev/stdout"))


def test_programs_print_nothing_into_their_results(
    cache: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    lookup.learn(identify_for_torch(CPU), {stream_key(): a_chunk()})
    monkeypatch.setattr(rehearse, "rehearse", lambda *_, **__: {"calls": [], "host microseconds": {}, "kernels": []})
    for stream in ("stdout", "stderr"):
        with redirected(**{stream: "table.json"}):
            assert cli.main(["export", "--device", "cpu", "--out", f"/dev/{stream}"]) == 0
        assert len(parse(Path("table.json").read_text("utf-8")).entries) == 1
        with redirected(**{stream: "found.json"}):
            assert rehearse.main(["--out", f"/dev/{stream}"]) == 0
        assert json.loads(Path("found.json").read_text("utf-8"))["kernels"] == []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for program in (sweep.main, gpu_check.main):  # they write again and again
        with redirected(stdout="found.json"):
            assert "--out: /dev/stdout is no file" in refused(program, "--out", "/dev/stdout", "--device", "cpu")
