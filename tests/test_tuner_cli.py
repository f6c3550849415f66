"""`python -m gssf_triton.autotune`: what each command prints, its exit status, and what it makes of misuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tuner_kit import CPU, a_chunk, cache, measured, stream_key  # noqa: F401

import gssf_triton
from gssf_triton.autotune import compile_gate, lookup, tuner
from gssf_triton.autotune.cli import main
from gssf_triton.autotune.shapes import SETS, Shape, keys_for
from gssf_triton.autotune.space import DTYPES, Key
from gssf_triton.autotune.tables import Table, parse, render
from gssf_triton.autotune.tuner import Report
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.devices import identify_for_torch

pytestmark = pytest.mark.usefixtures("cache")

Output = pytest.CaptureFixture[str]


def save(*rows: int) -> None:
    lookup.learn(identify_for_torch(CPU), {stream_key(n): a_chunk() for n in rows})
    lookup.forget()


# ------------------------------------------------------------------------------------------------------------ misuse


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["tune", "--shape", "8192"], "a shape must be MxNxD or MxNxDxB, such as 8192x8192x1024x32, got '8192'"),
        (["tune", "--shape", "0x8x8"], "M of a shape must be a whole number from 1 up, got 0"),
        (["tune", "--shape", "8x8x10x4"], "B of a shape must divide D, got D = 10, B = 4"),
        (["tune", "--set", "all"], "invalid choice: 'all'"),
        (["tune", "--kernel", "magic"], "invalid choice: 'magic'"),
        (["tune", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["tune", "--time-limit", "0"], "must be above 0, got 0"),
        (["tune", "--time-limit", "soon"], "'soon' is no number"),
        (["tune", "--candidates", "-1"], "must be above 0"),
        (["tune", "--device", "tpu"], "'tpu' is no device"),
        (["tune", "--device", "meta"], "'meta' is not supported"),
        (["tune", "--shapes", "no-such-file.json"], "no-such-file.json cannot be read (No such file or directory)"),
        (["show", "--for", "nvidia-1"], "'nvidia-1' is none of nvidia-a100 (sm_80)"),
        (["check", "no-such-table.json"], "no-such-table.json cannot be read"),
        (["export", "extra"], "unrecognized arguments: extra"),
        (["doctor", "--device", "cuda:99"], "--device: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_clear_line_and_status_2(arguments: list[str], complaint: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert not said.out
    assert complaint in said.err and said.err.count("\n") == 1, said.err
    assert said.err.startswith("python -m gssf_triton.autotune")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is no JSON"),
        ("[]", "must hold a list of shapes"),
        ("{}", "must hold a list of shapes"),
        ("[3]", "a shape must be an object with M, N, D, B and dtype"),
        ('[{"M": 1}]', "a shape must be an object with M, N, D, B and dtype"),
        ('[{"M": 1, "N": 1, "D": "8", "B": 0, "dtype": "bf16"}]', "D of a shape must be a whole number"),
        ('[{"M": 1, "N": 1, "D": 8, "B": 0, "dtype": "int8"}]', "dtype of a shape must be one of"),
    ],
)
def test_a_file_of_shapes_is_checked(text: str, complaint: str, tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes", str(path)])
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_kernel_that_needs_a_gpu_says_so(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gssf_triton.autotune.cli.interpreter_is_on", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--device", "cpu", "--kernel", "fold", "--shape", "8x8x8x4"])
    assert stopped.value.code == 2
    assert "--kernel fold needs a GPU" in capsys.readouterr().err


def test_help_names_every_command_and_the_variables(capsys: Output) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("tune", "show", "check", "export", "doctor", "GSSF_AUTOTUNE=off|cached|on"))
    for command in ("tune", "show", "check", "export", "doctor"):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0 and "options:" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- tune


def test_tune_writes_results_and_skips_them_the_next_time(tmp_path: Path, capsys: Output) -> None:
    shapes = tmp_path / "shapes.json"
    shapes.write_text(json.dumps([{"M": 40, "N": 40, "D": 8, "B": 0, "dtype": "fp32"}]), encoding="utf-8")
    command = ["tune", "--device", "cpu", "--shapes", str(shapes), "--candidates", "2"]
    assert main(command) == 0
    assert "1 tuned, 0 tuned before, 0 failed, 0 left" in capsys.readouterr().out
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out == "0 tuned, 1 tuned before, 0 failed, 0 left\n"
    assert main([*command, "--quiet", "--force"]) == 0
    assert "1 tuned, 0 tuned before" in capsys.readouterr().out


def test_tune_passes_its_options_on_and_reports_what_is_left(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    def tune(keys: list, where: object, **options: object) -> Report:
        asked.update(options, keys=keys, where=where)
        return Report((), (), (), tuple(keys))

    monkeypatch.setattr(tuner, "tune", tune)
    limits = ["--time-limit", "2.5", "--candidates", "7", "--force", "--quiet"]
    assert main(["tune", "--device", "cpu", "--shape", "64x64x8", "--dtype", "fp32", "bf16", *limits]) == 1
    assert "1 left; the same command goes on from here" in capsys.readouterr().out
    assert (asked["time_limit"], asked["most_candidates"], asked["force"]) == (2.5, 7, True)
    # Half-precision features are folded in float32 there: both ask for one chunk.
    assert asked["keys"] == keys_for([Shape(64, 64, 8, 0, "fp32")], ["chunk"])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_cpu_tunes_what_its_losses_look_up(dtype: str, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every numerics that the sets have runs there, and losses of such features ask for what was tuned."""
    size = ["--shape", "64x64x8", "--dtype", dtype]
    assert main(["tune", "--device", "cpu", *size, "--candidates", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == "1 tuned, 0 tuned before, 0 failed, 0 left\n"
    lookup.forget()
    asked: list[Key] = []
    find = lookup.find

    def noted(key: Key, *rest: Any) -> lookup.Answer | None:
        asked.append(key)
        return find(key, *rest)

    monkeypatch.setattr(lookup, "find", noted)
    x = torch.randn(64, 8, dtype=DTYPES[dtype])
    gssf_triton.info_nce(x, x, torch.ones(8), logit_scale=1.0)
    (key,) = set(asked)
    assert key in lookup.entries_for(identify_for_torch(CPU))


def test_an_interrupted_run_ends_politely(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(*args: object, **options: object) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuner, "tune", tune)
    assert main(["tune", "--device", "cpu", "--shape", "64x64x8", "--quiet"]) == 1
    assert "the same command goes on from here" in capsys.readouterr().out


def test_dry_run_lists_keys_and_tunes_nothing(cache: Path, capsys: Output) -> None:  # noqa: F811
    assert main(["tune", "--device", "cpu", "--dry-run"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SETS["cpu"])
    assert not cache.exists()


# -------------------------------------------------------------------------------------------------------------- show


def test_show_says_what_would_run_and_why(capsys: Output) -> None:
    save(4096)
    assert main(["show", "--device", "cpu", "--shape", "4000x4000x256", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "ChunkConfig(rows=512, columns=2048)" in said and "measured, for this very key, 1 ms" in said
    main(["show", "--device", "cpu", "--shape", "8192x8192x256", "--dtype", "fp32"])
    assert "measured, for the neighbour chunk fp32 M=4096 N=4096 D=256 B=0" in capsys.readouterr().out
    main(["show", "--device", "cpu", "--shape", "8192x8192x256", "--dtype", "bf16"])
    assert "neighbour chunk fp32 M=4096" in capsys.readouterr().out, "what a loss of such features looks up"
    main(["show", "--device", "cpu", "--shape", "8192x8192x256", "--dtype", "fp64"])
    assert "model: no table" in capsys.readouterr().out


def test_show_knows_gpus_that_are_not_here(capsys: Output) -> None:
    assert main(["show", "--for", "sm_90", "--shape", "8192x8192x1024x32"]) == 0
    said = capsys.readouterr().out
    for kernel in ("pairwise", "product", "fold", "gradient", "plan", "gradient_plan"):
        assert f"  {kernel} bf16 " in said
    assert "kind='fold_product'" in said and said.count("model: no table has this key") == said.count("16 M=") > 6
    main(["show", "--for", "nvidia-h100", "--shape", "8192x8192x768x24", "--kernel", "pairwise"])
    assert "PairwiseConfig(BLOCK_M=128, BLOCK_N=128" in capsys.readouterr().out


def test_show_under_off_is_the_model(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    save(4096)
    monkeypatch.setenv("GSSF_AUTOTUNE", "off")
    main(["show", "--device", "cpu", "--shape", "4000x4000x256", "--dtype", "fp32"])
    assert "ChunkConfig(rows=512, columns=1024)" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- check and export


def test_check_runs_the_compile_gate_over_the_tables(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list = []

    def gate(cases: list, jobs: int, verbose: bool) -> int:
        seen.append((cases, jobs, verbose))
        return len(seen) - 1

    # Recording launches takes a process without the interpreter: tests/test_compile_gate.py does.
    monkeypatch.setattr(compile_gate, "table_cases", lambda table: [table.arch])
    monkeypatch.setattr(compile_gate, "run", gate)
    path = tmp_path / "mine.json"
    path.write_text(render(Table("mine", "sm_90", ("NVIDIA H100",))), encoding="utf-8")
    assert main(["check", str(path), "--jobs", "3", "--quiet"]) == 0
    assert seen == [(["sm_90"], 3, False)]
    assert main(["check", str(path)]) == 1, "what the gate refuses fails the command"
    assert main(["check", str(path), "--no-compile"]) == 0 and len(seen) == 2
    assert main(["check"]) == 0, "no table ships"
    assert "all legal" in capsys.readouterr().out


def test_check_refuses_an_illegal_table(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{}", encoding="utf-8")
    assert main(["check", str(path)]) == 1
    assert "refused: " in (said := capsys.readouterr().out) and "mine.json: format must be 1" in said


def test_export_and_back(tmp_path: Path, capsys: Output) -> None:
    """A user's results become a table that ships: legal, without the driver, and served to the same device."""
    save(64, 128)
    path = tmp_path / "cpu.json"
    assert main(["export", "--device", "cpu", "--out", str(path)]) == 0
    assert "2 entries" in capsys.readouterr().err
    table = parse(path.read_text(encoding="utf-8"))
    assert dict(table.entries) == {stream_key(64): a_chunk(), stream_key(128): a_chunk()}
    assert not table.identity and table.serves(identify_for_torch(CPU))
    assert main(["check", str(path)]) == 0
    assert main(["export", "--device", "cpu", "--out", "-", "--name", "Best CPU"]) == 0
    said = capsys.readouterr().out
    assert parse(said[said.index("{") :]).slug == "best-cpu"


def test_an_exported_table_serves_as_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gssf_triton.autotune import tables

    save(64)
    folder = tmp_path / "tables"
    folder.mkdir()
    main(["export", "--device", "cpu", "--out", str(folder / "mine.json")])
    monkeypatch.setattr(tables, "SHIPPED", folder)
    monkeypatch.setenv("GSSF_CACHE_DIR", str(tmp_path / "another user's"))
    lookup.forget()
    assert lookup.entries_for(identify_for_torch(CPU)) == {stream_key(64): a_chunk()}
    lookup.learn(identify_for_torch(CPU), {stream_key(64): measured(ChunkConfig(2048, 4096))})
    config = lookup.entries_for(identify_for_torch(CPU))[stream_key(64)].config
    assert config == ChunkConfig(2048, 4096), "the user's own comes first"


def test_export_with_nothing_to_export(capsys: Output) -> None:
    assert main(["export", "--device", "cpu"]) == 1
    assert "nothing to export" in capsys.readouterr().out


def test_export_to_where_it_cannot_write(tmp_path: Path, capsys: Output) -> None:
    save(64)
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--device", "cpu", "--out", str(tmp_path / "no" / "folder.json")])
    assert stopped.value.code == 2 and "cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ doctor


def test_doctor_tells_what_a_bug_report_needs(cache: Path, capsys: Output) -> None:  # noqa: F811
    assert main(["doctor", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for word in ("torch", "triton", "python", "driver", "device", "backend", "GSSF_AUTOTUNE", "auto takes torch"):
        assert word in said
    assert str(cache) in said and "none yet" in said
    save(64)
    (path,) = cache.glob("*.json")
    path.with_name(f"{path.name}.broken-1").write_text("x", encoding="utf-8")
    main(["doctor", "--device", "cpu"])
    assert "1 entries, 1 broken file(s) set aside" in capsys.readouterr().out


def test_the_module_runs_as_a_command(tmp_path: Path) -> None:
    environment = {**os.environ, "GSSF_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "gssf_triton.autotune"]
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and "gssf_triton" in done.stdout, done.stderr
    wrong = subprocess.run([*command, "tune", "--shape", "x"], capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
