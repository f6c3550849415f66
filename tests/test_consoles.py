"""Names and consoles of any encoding, none at all, no tqdm, and what `--help` does: print, and nothing else."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import loop
from PIL import Image
from support.tuner_kit import cache  # noqa: F401

from gssf_triton import console, progress
from gssf_triton.autotune import cli, compile_gate, rehearse, tuner
from gssf_triton.autotune.tuner import Report
from gssf_triton.command import main
from gssf_triton.data import load_glyphs

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["a café", "二匹の犬", "три", "=1+1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.eye(4, dtype=np.float32))
    Path("texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return tmp_path


class Console(io.TextIOWrapper):
    """A console of an encoding, and what was written to it."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    @property
    def bytes(self) -> bytes:
        self.flush()
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue()


def consoles(patch: pytest.MonkeyPatch, encoding: str) -> tuple[Console, Console]:
    made = Console(encoding), Console(encoding)
    for name, stream in zip(("stdout", "stderr"), made, strict=True):
        patch.setattr(sys, name, stream)
    return made


SEARCH = ["search", "x.npy", "x.npy", "--cosine", "-k", "2", "--texts", "texts.txt"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp949", "iso8859-15", "utf-8", "utf-16"])
def test_results_on_a_console_of_any_encoding(encoding: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        out, err = consoles(patch, encoding)
        assert main(SEARCH) == 0
    found = json.loads(out.bytes.decode(encoding))
    assert [row["text"] for row in found] == TEXTS, "no character of JSON is lost"
    assert [match["index"] for match in found[2]["matches"]] == [2, 0] and not err.bytes
    with monkeypatch.context() as patch:
        out, err = consoles(patch, encoding)
        assert main([*SEARCH, "--format", "csv", "--quiet"]) == 0
    rows = list(csv.DictReader(io.StringIO(out.bytes.decode(encoding))))
    assert [row["index"] for row in rows] == ["0", "1", "1", "0", "2", "0", "3", "0"]
    wanted = TEXTS[1].encode(encoding, "backslashreplace").decode(encoding)
    assert rows[2]["query_text"] == wanted and not err.bytes


def test_names_that_are_no_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Latin-1's bytes, as old archives have them: in messages, JSON, CSV and both kinds of sheets."""
    name = os.fsdecode
    os.rename("x.npy", b"x\xff.npy")
    os.mkdir(b"im\xe9")
    for i in range(4):
        Image.new("RGB", (9, 9)).save(name(b"im\xe9/\xfe%d.png" % i))
    x = name(b"x\xff.npy")
    for form, sheet in (("json", b"s\xff.html"), ("csv", b"s\xff.png")):
        with monkeypatch.context() as patch:
            _, err = consoles(patch, "utf-8")
            argv = ["search", x, x, "--cosine", "-k", "1", "--images", name(b"im\xe9"), "--sheet", name(sheet)]
            assert main([*argv, "--out", name(b"\xfe." + form.encode())]) == 0
        assert err.bytes.decode().splitlines() == [
            f"results: \\udcfe.{form}", f"sheet: {sheet.decode(errors='backslashreplace')}".replace("\\x", "\\udc")
        ]  # fmt: skip
        assert os.path.getsize(sheet) > 100
    found = json.loads(Path(name(b"\xfe.json")).read_text("utf-8"))
    assert [os.fsencode(row["image"]) for row in found] == [b"im\xe9/\xfe%d.png" % i for i in range(4)]
    rows = list(csv.DictReader(io.StringIO(Path(name(b"\xfe.csv")).read_text("utf-8"))))
    assert rows[3]["image"] == r"im\udce9/\udcfe3.png"
    with monkeypatch.context() as patch:
        _, err = consoles(patch, "ascii")
        assert main(["search", name(b"no\xff.npy"), x, "--cosine"]) == 2
    assert err.bytes.startswith(rb"gssf-triton search: QUERIES: no\udcff.npy: no such file")


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1", "@A1", "\t=1", "＝1", "－1"])
def test_no_cell_of_a_csv_file_is_a_formula(start: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gssf_triton.command.results import as_csv

    (row,) = list(csv.reader(io.StringIO(as_csv(["a", "b", "c", "d"], [[start, -0.5, -3, "a-b"]]))))[1:]
    assert row == [f"'{start}", "-0.5", "-3", "a-b"]
    assert as_csv(["a"], [[f" {start}"], [f"\r{start}"], ["a =1"]]).splitlines()[1:] == [
        f"' {start}", f"' {start}", "a =1"
    ]  # fmt: skip
    text = start.strip()
    os.makedirs("-images")
    for i in range(4):
        Image.new("RGB", (9, 9)).save(f"-images/{i}.png")
    Path("texts.txt").write_text(f"{text}\nb\rc\nd\ne\n", encoding="utf-8", newline="")
    argv = [*SEARCH, "--query-texts=texts.txt", "--images=-images", "--format", "csv", "--quiet"]
    assert main(argv) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[0]["query_text"] == rows[0]["text"] == f"'{text}" and rows[0]["image"] == "'-images/0.png"
    assert len(rows) == 8 and rows[2]["query_text"] == "b c", "a carriage return would end the row"


# ---------------------------------------------------------------- consoles that are closed or full


def test_a_closed_console(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python has None for it (`>&-`, a service without one)."""
    with monkeypatch.context() as patch:
        for name in ("stdout", "__stdout__"):
            patch.setattr(sys, name, None)
        assert main(SEARCH) == 2
        assert main([*SEARCH, "--out", "found.json"]) == 0
    said = capsys.readouterr()
    assert "--out: expected a file's name, for standard output is closed" in said.err and said.out == ""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(SEARCH) == 0
        assert main(["search", "no.npy", "x.npy", "--cosine"]) == 2
    assert json.loads(capsys.readouterr().out) == json.loads(Path("found.json").read_text("utf-8")), "no word of stderr"


def test_a_full_disk_under_standard_output(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, open("/dev/full", "w", encoding="utf-8") as full:
        _, err = consoles(patch, "utf-8")
        patch.setattr(sys, "stdout", full)
        assert main(SEARCH) == 2
    assert err.bytes.decode().splitlines() == [
        "gssf-triton search: standard output cannot be written (No space left on device)"
    ]


# ---------------------------------------------------------------- --help


def program(name: str) -> Callable[[list[str]], int]:
    return importlib.import_module(name).main  # type: ignore[no-any-return]


def study(name: str) -> Callable[[list[str]], int]:
    module = importlib.import_module(name)
    return lambda argv: int(module.main(module.STUDY, argv))


PROGRAMS: dict[str, Callable[[], Callable[[list[str]], Any]]] = {
    "gssf_triton/__main__.py": lambda: main,
    "autotune/__main__.py": lambda: cli.main,
    "autotune/compile_gate.py": lambda: compile_gate.main,
    "autotune/rehearse.py": lambda: rehearse.main,
    **{
        f"perf/{name}.py": lambda name=name: program(name)
        for name in ("sweep", "report", "host", "first_run", "gpu_check")
    },
    **{
        f"examples/{name}.py": lambda name=name: program(name)
        for name in ("demo_report", "glyph_retrieval", "studies", "study_look")
    },
    **{
        f"examples/study_{name}.py": lambda name=name: study(f"study_{name}")
        for name in ("attention", "distillation", "fine_grained", "frozen", "image_text", "regions", "reid")
    },
    "tests/fuzz/__main__.py": lambda: program("fuzz.loop"),
}


def state() -> dict[str, str]:
    """What programs write in a clone: its READMEs."""
    paths = [ROOT / "README.md", *(ROOT / "examples").rglob("*.md")]
    return {f"{path}": hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns) for path in paths}


def test_every_program_is_listed() -> None:
    folders = [ROOT / name for name in ("gssf_triton", "kernels", "autotune", "perf", "examples", "tests/fuzz")]
    found = {
        str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.py")
        if path.name == "__main__.py" or "\nif __name__ == \"__main__\":\n    " in path.read_text("utf-8")
    }  # fmt: skip
    mains = {"gssf_triton/__main__.py", "autotune/__main__.py"}
    assert found - mains - {"perf/bench/first/worker.py"} == set(PROGRAMS) - mains


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_prints_on_any_console_and_does_nothing_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PROGRAMS[name]()
    monkeypatch.chdir(tmp_path)
    before = state()
    for argv, status in ((["--help"], 0), (["--no-such-option"], 2)):
        with monkeypatch.context() as patch:
            out, err = consoles(patch, "ascii")
            with pytest.raises(SystemExit) as stopped:
                run(argv)
        assert stopped.value.code == status, err.bytes
        assert (out.bytes if status == 0 else err.bytes).isascii() and bool(out.bytes) == (status == 0)
    assert state() == before and not list(tmp_path.iterdir())


def test_help_of_a_process_that_waits_for_tasks() -> None:
    command = [sys.executable, str(ROOT / "perf/bench/first/worker.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: perf/bench/first/worker.py")


def test_a_reader_that_has_seen_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """`… | head` closes the pipe: no program of ours complains."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w", encoding="utf-8", closefd=True) as out:
        _, err = consoles(patch, "utf-8")
        patch.setattr(sys, "stdout", out)
        patch.setattr(cli, "show", lambda args: print("x" * 10**6, flush=True) or 0)
        assert cli.main(["show", "--device", "cpu"]) == 0
    assert not err.bytes


# ---------------------------------------------------------------- without tqdm


def test_tqdm_is_imported_in_one_place() -> None:
    """In the examples and the tests it is a requirement."""
    found = {
        str(path.relative_to(ROOT)) for folder in ("gssf_triton", "kernels", "autotune", "perf")
        for path in (ROOT / folder).rglob("*.py") if re.search(r"^\s*(from|import) tqdm", path.read_text("utf-8"), re.M)
    }  # fmt: skip
    assert found == {"gssf_triton/progress.py", "gssf_triton/command/results.py"}


@pytest.mark.usefixtures("cache")
def test_the_tuner_and_the_gate_without_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    tune = ["tune", "--device", "cpu", "--shape", "64x64x8", "--dtype", "fp32", "--candidates", "2"]
    assert cli.main(tune) == 0
    said = capsys.readouterr()
    assert "1 tuned, 0 tuned before" in said.out and "tuning: 1/1 key" in said.err
    assert cli.main([*tune, "--quiet", "--force"]) == 0
    assert capsys.readouterr() == ("1 tuned, 0 tuned before, 0 failed, 0 left\n", "")

    def interrupted(*_: object, progress: Callable[..., object], **__: object) -> Report:
        progress("a key", "a configuration")
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "tune", interrupted)
    assert cli.main(tune) == 1 and "stopped; what was found is kept" in capsys.readouterr().out
    assert compile_gate.compile_all([], 1) == {}


def test_the_fuzzer_without_tqdm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert loop.main(["--function", "dense_metric", "--start", "0", "--cases", "2", "--out", str(tmp_path)]) == 0
    assert "2/2  cases" in capsys.readouterr().err


def test_lines_in_the_place_of_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    with progress.bar(total=4, initial=2, unit="cell", dynamic_ncols=True) as bar:
        bar.set_postfix_str("fp32")
        bar.update()
        bar.write("a word")
        bar.update()
        assert bar.n == 4
    with progress.bar(["a", "b"], unit="step") as steps:
        for name in steps:
            steps.set_description(name)
    assert list(progress.bar(iter([1, 2]), desc="hidden", disable=True)) == [1, 2]
    said = capsys.readouterr()
    assert said.out == "a word\n"
    assert said.err.splitlines() == ["3/4 cell  fp32", "4/4 cell  fp32", "a: 1/2 step", "b: 2/2 step"]
    with pytest.raises(ImportError, match="progress=True needs tqdm"), progress.counting(True, "x", 1, "y"):
        pytest.fail("a function's own bar is asked for: that stays an error")


def test_a_console_that_is_no_text_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook, whose streams are of another kind."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.ready()
    assert not console.knows_unicode()


def test_the_glyphs_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "gssf_triton\[data\]"'):
        load_glyphs()
