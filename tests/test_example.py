"""The glyph example: its metrics against brute force, its checkpoints, and a whole short run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from glyph_model import MAX_WORDS, tokenize
from glyph_retrieval import main, parse
from glyph_training import LOSSES, Run, Settings, info_nce, load_teacher, recalls, test_pairs

from gssf_triton.data.glyphs import Glyphs, load_glyphs

test_pairs.__test__ = False  # type: ignore[attr-defined]

TINY = Settings(steps=6, batch_size=16, dim=32, block_size=8, evaluations=2, held_out=40)


@pytest.fixture(scope="module")
def split() -> tuple[Glyphs, Glyphs]:
    import numpy as np

    glyphs = load_glyphs(progress=False)
    return glyphs.only(np.arange(0, len(glyphs.names), 50)).split(held_out=TINY.held_out)


def make(split: tuple[Glyphs, Glyphs], path: Path, settings: Settings = TINY) -> Run:
    train, test = split
    return Run(settings, "both", 0, train, test_pairs(test), torch.device("cpu"), path)


def test_recalls_count_ranks() -> None:
    S = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.0, 0.6, 0.5]])
    scores = recalls(S)
    assert scores["i2t_r1"] == pytest.approx(100 / 3) and scores["t2i_r1"] == pytest.approx(100)
    assert scores["i2t_r5"] == scores["t2i_r10"] == 100


def test_recalls_of_a_constant_matrix_are_no_better_than_nothing() -> None:
    assert recalls(torch.zeros(50, 50))["rsum"] == 0


def test_the_loss_of_a_matrix_falls_to_zero_where_it_is_perfect_and_not_before() -> None:
    assert info_nce(torch.eye(8), torch.tensor(100.0).log()).item() < 1e-6
    assert info_nce(torch.zeros(8, 8), torch.tensor(0.0)).item() == pytest.approx(torch.tensor(8.0).log().item())


def test_tokens_tell_names_apart_and_know_parts_of_unseen_words() -> None:
    tokens = tokenize(["GREEK SMALL LETTER ALPHA", "GREEK SMALL LETTER BETA", "ALPHABETICAL"])
    assert tokens.shape[1] == MAX_WORDS and not torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0, :3], tokens[1, :3])
    assert len(set(tokens[0, 3].tolist()) & set(tokens[2, 0].tolist()) - {0}) >= 2


def test_batches_hold_distinct_names(split: tuple[Glyphs, Glyphs], tmp_path: Path) -> None:
    sampler = make(split, tmp_path / "x.pt").sampler
    for _ in range(5):
        _, tokens = sampler.draw()
        assert len(tokens.flatten(1).unique(dim=0)) == TINY.batch_size


def test_a_run_cut_short_resumes_to_the_same_bits(split: tuple[Glyphs, Glyphs], tmp_path: Path) -> None:
    whole = make(split, tmp_path / "whole.pt")
    list(whole.train())

    cut = make(split, tmp_path / "cut.pt")
    for measured in cut.train():
        if measured["step"] == 4:  # after the checkpoint at step 3: the fourth step is lost and done again
            break
    resumed = make(split, tmp_path / "cut.pt")
    assert resumed.step == 3
    list(resumed.train())

    assert resumed.history == whole.history
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_its_training_batches(split: tuple[Glyphs, Glyphs], tmp_path: Path, loss: str) -> None:
    """And a resumed run, with its teacher or in the middle of its warm-up, goes on to the same bits."""
    teacher = ""
    if loss == "distillation":
        teacher = str(tmp_path / "teacher.pt")
        list(make(split, Path(teacher), replace(TINY, dim=24, evaluations=1)).train())
    settings = replace(TINY, loss=loss, teacher=teacher, steps=24, evaluations=2, all_negatives=0.75)
    run = make(split, tmp_path / "run.pt", settings)
    losses = [measured["loss"] for measured in run.train()]
    ends = losses[17] if loss == "triplet" else losses[-1]  # of the hinge, while it takes all negatives
    assert ends < 0.8 * losses[0]
    if loss == "triplet":
        assert run.model.loss.hardest
        hardest = losses[18:]
        assert max(hardest) < 2 * 2 * TINY.batch_size and run.history[-1]["violations"] <= 2 * TINY.batch_size
        assert run.history[0]["violations"] > 2 * TINY.batch_size
    if teacher:
        assert not any(x.requires_grad for x in load_teacher(teacher).parameters())

    cut = make(split, tmp_path / "cut.pt", settings)
    for measured in cut.train():
        if measured["step"] == 14:
            break
    resumed = make(split, tmp_path / "cut.pt", settings)
    assert resumed.step == 12
    list(resumed.train())
    assert resumed.history == run.history


def test_other_settings_in_the_same_folder_are_refused(split: tuple[Glyphs, Glyphs], tmp_path: Path) -> None:
    list(make(split, tmp_path / "x.pt").train())
    with pytest.raises(ValueError, match=r"other settings \(steps\): .*--fresh"):
        make(split, tmp_path / "x.pt", Settings(**{**TINY.__dict__, "steps": 8}))


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path / "run"), "--steps", "4", "--batch-size", "32", "--dim", "32", "--block-size", "8"]
    command += ["--held-out", "60", "--metric", "all"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [run["metric"] for run in results["runs"]] == ["cosine", "diag", "bdiag", "both"]
    for run in results["runs"]:
        assert f"{run['history'][-1]['rsum']:.1f}" in printed
    for name in ("learning_curve.png", "learning_curve.svg", "retrieval_sheet.png"):
        assert (tmp_path / "run" / name).stat().st_size > 1000

    assert main([*command, "--block-size", "16"]) == 2
    assert "other settings (block_size)" in capsys.readouterr().err


def test_misuse_ends_in_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--dim", "100", "--block-size", "32"])
    assert stopped.value.code == 2 and "--block-size must divide --dim = 100, got 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "distillation"], "--loss distillation needs --teacher"),
        (["--teacher", "x.pt"], "no other loss takes one"),
        (["--loss", "distillation", "--teacher", "nowhere.pt"], "there is no nowhere.pt"),
    ],
)
def test_distillation_asks_for_its_teacher(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
