"""The studies: their trainer resumes and is fair to every column, their statistics are the textbook's, and all run."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import studies
import study_data
import study_frozen
import study_image_text
import study_look
import study_regions
import study_report
import study_runner
import torch
from PIL import Image
from scipy import stats
from study_regions import score_numbers
from study_trainer import Column, NormalizedAfter, Settings, folded, hinge, train

import gssf_triton

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    "--steps",
    "4",
    "--tower-steps",
    "4",
    "--batch-size",
    "8",
    "--dim",
    "16",
    "--width",
    "2",
    "--seeds",
    "2",
    "--evaluations",
    "2",
]
SMALL_GLYPHS = ["--limit", "200", "--held-out", "20"]
#: A size of blocks that divides every study's channels here, the attention heads' 16 / 4 too.
COLUMNS = ["--columns", "cosine", "diag", "bdiag-4", "both-4"]
SETTINGS = Settings(steps=4, batch_size=8, dim=16, width=2, evaluations=2)


def source(tmp_path: Path) -> study_data.Source:
    return study_data.Source(cache=tmp_path, held_out=20, limit=200, tower_steps=4)


def task(column: str, seed: int, tmp_path: Path, settings: Settings = SETTINGS) -> Any:
    parsed = Column.parse(column)
    return study_image_text.make(parsed.settings(settings), parsed, seed, source(tmp_path))


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_runs_and_never_twice(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", str(tmp_path), *TINY, *SMALL_GLYPHS, *COLUMNS]
    study = studies.study_of(name)
    assert study_runner.main(study, argv) == 0
    path = tmp_path / f"{name}.json"
    results = json.loads(path.read_text("utf-8"))
    done = [(run["column"], run["seed"]) for run in results["runs"]]
    assert sorted(done) == sorted(itertools.product(["cosine", "diag", "bdiag-4", "both-4"], [0, 1]))
    for run in results["runs"]:
        assert run["final"] == run["history"][-1] and run["final"]["step"] == 4
        assert 0 <= run["final"][study.headline] <= 600 and set(study.shown) <= run["final"].keys()
    assert study_report.markdown(results) in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 1000
    assert not list((tmp_path / "checkpoints").glob("*"))

    before = path.stat().st_mtime_ns
    assert study_runner.main(study, argv) == 0 and path.stat().st_mtime_ns == before
    assert study_runner.main(study, [*argv, "--steps", "5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_run_cut_short_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = task("both-4:metric_pull=1", 0, tmp_path)
    *_, history = train(whole, {"run": 1})
    checkpoint = tmp_path / "x.pt"
    for _ in itertools.islice(train(task("both-4:metric_pull=1", 0, tmp_path), {"run": 1}, checkpoint), 3):
        pass  # saved at step 2; the third is lost and done again
    resumed = task("both-4:metric_pull=1", 0, tmp_path)
    *_, again = train(resumed, {"run": 1}, checkpoint)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    # Killed after the last step, before the result was stored: nothing is trained again.
    assert list(train(task("both-4:metric_pull=1", 0, tmp_path), {"run": 1}, checkpoint)) == [history]
    with pytest.raises(ValueError, match=r"other settings \(run\)"):
        next(train(task("both-4", 0, tmp_path), {"run": 2}, checkpoint))


def test_every_column_starts_from_the_same_towers_and_sees_the_same_batches(tmp_path: Path) -> None:
    first, second = task("cosine", 3, tmp_path), task("bdiag-4", 3, tmp_path)
    towers = {name: p for name, p in first.named_parameters() if name.startswith(("images", "texts"))}
    assert len(towers) > 10
    for name, value in towers.items():
        assert torch.equal(dict(second.named_parameters())[name], value), name
    for a, b in zip(first.draw(), second.draw(), strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(first.loss(0), second.loss(0), rtol=1e-5)  # both start as the cosine
    other = task("cosine", 4, tmp_path)
    assert set(other.test_set.texts) != set(first.test_set.texts)
    assert not set(first.test_set.texts) & set(first.training_set.texts)


@pytest.mark.parametrize("change", ["metric_rate=0", "metric_pull=1000", "metric_rate=1"])
def test_the_metrics_own_rate_and_pull(change: str, tmp_path: Path) -> None:
    made = task(f"both-4:learning_rate=0.01,{change}", 0, tmp_path)
    for _ in train(made, {}):
        pass
    W_diag, W_blocks = made.metric.W_diag.detach(), made.metric.W_blocks.detach()
    moved = float((W_diag - 1).abs().max() + W_blocks.abs().max())
    # A pull of 1000 at rates up to 0.01 leaves each weight at its start again; at the last, lowest rate not quite.
    assert moved > 1e-3 if change == "metric_rate=1" else moved < (1e-3 if "pull" in change else 1e-12)


def test_a_symmetric_metric_stays_symmetric(tmp_path: Path) -> None:
    trained = task("both-4:symmetric=True", 0, tmp_path)
    for _ in train(trained, {}):
        pass
    W = trained.metric.W_blocks
    assert torch.equal(W, W.mT) and W.any()


def test_fixed_heads_leave_the_rest_to_learn(tmp_path: Path) -> None:
    trained = task("both-4:fixed_heads=True", 0, tmp_path)
    before = {name: x.clone() for name, x in trained.named_parameters()}
    for _ in train(trained, {}):
        pass
    moved = {name for name, x in trained.named_parameters() if not torch.equal(x, before[name])}
    heads = {f"{tower}.head.{kind}" for tower in ("images", "texts") for kind in ("weight", "bias")}
    assert heads < before.keys() and not heads & moved
    assert {"metric.W_diag", "metric.W_blocks", "images.trunk.0.weight"} <= moved


def test_results_from_before_a_setting_was_known_still_serve(tmp_path: Path) -> None:
    study, argv = (
        studies.study_of("reid"),
        ["--out", str(tmp_path), *TINY, *SMALL_GLYPHS, "--columns", "cosine", "--seeds", "1"],
    )
    assert study_runner.main(study, argv) == 0
    path = tmp_path / "reid.json"
    results = json.loads(path.read_text("utf-8"))
    del results["settings"]["symmetric"]
    path.write_text(json.dumps(results), "utf-8")
    before = path.stat().st_mtime_ns
    assert study_runner.main(study, argv) == 0 and path.stat().st_mtime_ns == before


def test_a_checkpoint_from_before_a_setting_was_known_still_serves(tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.pt"
    old = {name: value for name, value in asdict(SETTINGS).items() if name != "symmetric"}
    *_, history = train(task("cosine", 0, tmp_path), old, checkpoint)
    assert list(train(task("cosine", 0, tmp_path), asdict(SETTINGS), checkpoint)) == [history]
    with pytest.raises(ValueError, match=r"other settings \(symmetric\)"):
        next(train(task("cosine", 0, tmp_path), asdict(replace(SETTINGS, symmetric=True)), checkpoint))


def test_normalizing_after_the_fold() -> None:
    metric = Column.parse("both-4").metric(Settings(dim=8, normalize_after=True, metric_start=0.3))
    assert isinstance(metric, NormalizedAfter)
    a, b = torch.randn(5, 8), torch.randn(6, 8)
    x, weights = folded(metric, a)
    S = gssf_triton.pairwise_sim(x, b, **weights)
    W = metric.dense().detach().double()
    expected = torch.nn.functional.cosine_similarity((a.double() @ W)[:, None], b.double()[None], dim=-1)
    assert torch.allclose(S.double(), expected, atol=1e-6)


@pytest.mark.parametrize("hardest", [True, False])
def test_the_hinge_on_scores_is_the_librarys(hardest: bool) -> None:
    a, b = torch.randn(7, 4), torch.randn(7, 4)
    expected = gssf_triton.triplet_loss(a, b, torch.ones(4), margin=0.3, hardest=hardest)
    assert torch.allclose(hinge(a @ b.T, 0.3, hardest), expected, rtol=1e-5)


def test_numbers_from_scores_are_the_librarys() -> None:
    a, b = torch.randn(20, 4), torch.randn(60, 4)
    image_ids, text_ids = torch.arange(20), torch.arange(60) // 3
    expected = gssf_triton.metrics.image_text(
        a, b, torch.ones(4), image_ids=image_ids, text_ids=text_ids, normalize=False
    )
    for name, value in score_numbers(a @ b.T, image_ids, text_ids).items():
        assert value == pytest.approx(expected[name]), name


def test_two_views_of_a_group_differ() -> None:
    ids = np.array([5, 3, 5, 3, 3, 8, 8])
    groups = study_data.Groups(ids)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(50):
        chosen = torch.randperm(3, generator=generator)
        first, second = groups.draw(chosen, generator, views=2)
        assert (first != second).all()
        for rows in (first, second):
            assert ids[rows].tolist() == groups.groups[chosen].tolist()
        seen |= set(first.tolist()) | set(second.tolist())
    assert seen == set(range(7))


def results_of(columns: dict[str, list[float]]) -> dict[str, Any]:
    runs = [
        {"column": name, "seed": seed, "final": {"rsum": value}}
        for name, values in columns.items()
        for seed, value in enumerate(values)
    ]
    return {"headline": "rsum", "headline_title": "rsum", "shown": ["rsum"], "title": "t", "runs": runs}


def test_the_paired_test_and_its_correction() -> None:
    cosine, better, same = [10.0, 12.0, 11.0, 15.0, 9.0], [12.1, 13.9, 13.0, 17.2, 11.0], [10.5, 11.0, 12.0, 14.5, 9.1]
    found = study_report.compare(results_of({"cosine": cosine, "diag": better, "both-8": same}))
    for c, values in zip(found[1:], (better, same), strict=True):
        assert c.p == pytest.approx(stats.ttest_rel(values, cosine).pvalue)
        low, high = stats.ttest_rel(values, cosine).confidence_interval(0.95)
        assert (c.difference - c.interval, c.difference + c.interval) == pytest.approx((low, high))
    assert found[1].p_holm == pytest.approx(2 * found[1].p) and found[2].p_holm == pytest.approx(found[2].p)
    assert [c.verdict for c in found] == ["no difference shown", "better", "no difference shown"]
    table = study_report.markdown(results_of({"cosine": cosine, "diag": better, "both-8": same}))
    assert table.count("**") == 2 and "| both, B = 8 | 11.4 ± 2.0 |" in table


def test_holm() -> None:
    # Worked by hand: 4 × 0.01, then 3 × 0.02, then 2 × 0.04 = 0.08, then 1 × 0.05, held up to 0.08.
    assert study_report.holm([0.04, 0.01, float("nan"), 0.05, 0.02]) == pytest.approx(
        [0.08, 0.04, float("nan"), 0.08, 0.06], nan_ok=True
    )


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    results = results_of({"cosine": [1.0], "diag": [100.0]})
    assert study_report.compare(results)[1].verdict == "no difference shown"
    assert "**" not in study_report.markdown(results)
    study_report.plot(results, tmp_path / "x.png")


@pytest.mark.parametrize("text", ["both", "cosine-8", "bdiag-x", "cosin", "diag:rate=1"])
def test_columns_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="column"):
        Column.parse(text)


def test_columns_change_settings() -> None:
    column = Column.parse("both-8:metric_rate=0.5,normalize_after=True,steps=7")
    changed = column.settings(SETTINGS)
    assert (changed.metric_rate, changed.normalize_after, changed.steps) == (0.5, True, 7)
    assert str(column) == "both-8:metric_rate=0.5,normalize_after=True,steps=7" and changed.dim == SETTINGS.dim


def jpeg(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 10, 3), shade, dtype=np.uint8)).save(path)


def tiny_folder(data: str, root: Path) -> None:
    """A few items in the data set's own layout."""
    chance = np.random.default_rng(0)
    if data in ("f30k", "coco"):
        folder = root / f"{data}_precomp"
        folder.mkdir()
        for split, images in (("train", 12), ("dev", 10), ("test", 6)):
            np.save(folder / f"{split}_ims.npy", chance.normal(size=(images, 3, 8)).astype(np.float32))
            lines = [f"A dog number {i} runs over {i % 3} hills ." for i in range(5 * images)]
            (folder / f"{split}_caps.txt").write_text("\n".join(lines) + "\n")
    elif data == "market1501":
        for part, people in (("bounding_box_train", range(2, 12)), ("bounding_box_test", range(20, 26))):
            for person, camera in itertools.product(people, (1, 2, 3)):
                jpeg(root / part / f"{person:04d}_c{camera}s1_000001_01.jpg", 8 * person)
        for person in range(20, 26):
            jpeg(root / "query" / f"{person:04d}_c4s1_000001_00.jpg", 8 * person)
        jpeg(root / "bounding_box_test" / "-1_c1s1_000001_01.jpg", 0)
    elif data == "cub":
        names = [f"{c:03d}.Bird/{i}.jpg" for c in (*range(1, 11), *range(101, 105)) for i in range(3)]
        for name in names:
            jpeg(root / "images" / name, int(name[:3]))
        (root / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
        labels = "".join(f"{i} {int(name[:3])}\n" for i, name in enumerate(names, 1))
        (root / "image_class_labels.txt").write_text(labels)
    else:
        for part, classes in (("train", range(1, 11)), ("test", range(11, 15))):
            rows = ["image_id class_id super_class_id path"]
            for number, (c, i) in enumerate(itertools.product(classes, range(3)), 1):
                jpeg(root / f"sofa_final/{c}_{i}.JPG", 10 * c)
                rows.append(f"{number + 100 * (part == 'test')} {c} 1 sofa_final/{c}_{i}.JPG")
            (root / f"Ebay_{part}.txt").write_text("\n".join(rows) + "\n")


REAL = [
    ("image_text", "f30k"),
    ("image_text", "coco"),
    ("regions", "f30k"),
    ("distillation", "f30k"),
    ("frozen", "f30k"),
    ("attention", "coco"),
    ("reid", "market1501"),
    ("fine_grained", "cub"),
    ("fine_grained", "sop"),
]


@pytest.mark.parametrize("name, data", REAL, ids=["-".join(pair) for pair in REAL])
def test_real_layouts(name: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    root.mkdir()
    tiny_folder(data, root)
    argv = ["--data", data, "--root", str(root), "--out", str(out), *TINY, "--seeds", "1", "--columns", "both-4"]
    assert study_runner.main(studies.study_of(name), argv) == 0, capsys.readouterr().err
    run = json.loads((out / f"{name}-{data}.json").read_text("utf-8"))["runs"][0]
    assert run["column"] == "both-4" and np.isfinite(run["final"][studies.study_of(name).headline])
    missing = [*argv, "--root", str(tmp_path / "nowhere"), "--seed", "1"]
    assert study_runner.main(studies.study_of(name), missing) == 2 and "nowhere" in capsys.readouterr().err


def test_features_stay_on_disk_and_photographs_are_decoded_once(tmp_path: Path) -> None:
    (tmp_path / "f30k").mkdir()
    tiny_folder("f30k", tmp_path / "f30k")
    part, _ = study_data.image_text_pairs(study_data.Source("f30k", tmp_path / "f30k"), 0)
    assert isinstance(part.images, np.memmap)
    paths = tuple(tmp_path / f"{shade}.png" for shade in (10, 200))
    for path in paths:
        jpeg(path, int(path.stem))
    images = study_data.photographs(paths, tmp_path)
    assert isinstance(images, np.memmap) and images.shape == (2, 64, 64, 3)
    assert images[0].max() == 10 and images[1].min() == 200
    kept = next(tmp_path.glob("photographs-*.npy"))
    before = kept.stat().st_mtime_ns
    study_data.photographs(paths, tmp_path)
    assert kept.stat().st_mtime_ns == before


def test_real_data_starts_from_the_published_recipe() -> None:
    args = study_runner.arguments(study_image_text.STUDY, ["--data", "f30k", "--root", "x"])
    assert (args.loss, args.margin, args.batch_size) == ("triplet", 0.2, 128)
    settings = Settings(steps=args.steps, all_negatives=args.all_negatives)
    warm = settings.all_negatives * settings.steps  # one epoch of 145,000 captions in batches of 128
    assert 1000 < warm < 1300 and settings.steps == pytest.approx(30 * warm, rel=0.01)


@pytest.mark.parametrize("argv", [["--data", "f30k"], ["--root", "x"], ["--steps", "0"], ["--data", "cub"]])
def test_misuse_ends_in_one_clear_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study_runner.arguments(study_image_text.STUDY, argv)
    assert "error: " in capsys.readouterr().err


def test_the_frozen_studys_towers_never_saw_the_new_world(tmp_path: Path) -> None:
    base, new, test = study_data.transfer_pairs(study_data.Source(limit=400, held_out=20), 0)
    assert not set(base.texts) & (set(new.texts) | set(test.texts)) and not set(new.texts) & set(test.texts)
    made = study_frozen.make(Settings(dim=16, width=2, loss="info_nce"), Column.parse("both-4"), 0, source(tmp_path))
    learned = {name.rpartition(".")[2] for name, p in made.named_parameters() if p.requires_grad}
    assert learned == {"W_diag", "W_blocks", "log_logit_scale"}


def test_a_look_inside(tmp_path: Path) -> None:
    argv = ["--column", "both-8", "--seeds", "2", "--steps", "4", "--limit", "400", "--tower-steps", "4"]
    argv += ["--out", str(tmp_path)]
    assert study_look.main(argv) == 0
    look = json.loads((tmp_path / "look.json").read_text("utf-8"))
    for run in look["runs"]:
        assert -1 <= run["spearman"] <= 1 and 1 <= run["channels_learned"] <= 128
    assert (tmp_path / "look.png").stat().st_size > 1000


def test_the_cookbooks_tables_are_those_of_the_stored_results() -> None:
    text = (EXAMPLES / "README.md").read_text("utf-8")
    stored = studies.stored()
    shown = {study["study"] for study in stored}
    for name in set(studies.STUDIES) - shown:
        assert f"`study_{name}.py`" in studies.missing(stored)
    assert shown and bool(studies.missing(stored)) == (shown != set(studies.STUDIES))
    assert f"<!-- studies:begin -->\n{studies.details(stored)}\n<!-- studies:end -->" in text
    for study in stored:
        assert studies.complete(study, studies.study_of(study["study"]).columns), study["study"]
        assert (studies.RESULTS / f"{study['study']}.png").stat().st_size > 1000


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_learns_at_the_best_rate_of_its_tuning(name: str) -> None:
    study = studies.study_of(name)
    found = studies.tuned(name, json.loads((studies.RESULTS / "tuning" / f"{name}.json").read_text("utf-8")))
    assert found.keys() == set(study.columns)
    mean = study_report.mean_of_columns(found)
    assert len(mean) == 3 and study.settings.learning_rate == max(mean, key=lambda rate: mean[rate])


def test_tuning_tries_every_column_at_every_rate_on_seeds_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    take = study_runner.arguments
    monkeypatch.setattr(study_runner, "main", lambda study, argv: asked.append(take(study, argv)) or 0)
    assert studies.main(["--only", "reid", "--part", "tuning", "--out", str(tmp_path)]) == 0
    (args,) = asked
    rates = (0.002, 0.004, 0.008)
    assert args.columns[:6] == [f"{column}:learning_rate={rate}" for column in ("cosine", "diag") for rate in rates]
    assert len(args.columns) == 15 and args.out == tmp_path / "tuning"
    # No seed of any other table.
    assert args.seed == 100 and args.seeds == 2 and args.seed >= study_runner.Study.seeds


@pytest.mark.parametrize("pooling", ["max-mean", "lse-mean"])
def test_regions_and_words_are_pooled_as_the_settings_say(pooling: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, pooling=pooling)
    made = study_regions.make(settings, Column.parse("both-4"), 0, source(tmp_path))
    regions, words, mask = torch.randn(3, 5, 16), torch.randn(4, 6, 16), torch.rand(4, 6) < 0.7
    W_diag, W_blocks = made.metric.W_diag, made.metric.W_blocks
    expected = gssf_triton.late_interaction(
        regions, words, W_diag, W_blocks, word_mask=mask, normalize=True, pooling=pooling
    )
    assert torch.equal(made.scores(regions, words, mask), expected)


def test_tables_of_rates() -> None:
    table = study_report.rates_table({"cosine": {0.1: 1.0, 0.2: 3.0}, "both-8": {0.1: 6.0, 0.2: 5.0}})
    assert table.splitlines()[2:] == [
        "| cosine | 1.0 | 3.0 |",
        "| both, B = 8 | 6.0 | 5.0 |",
        "| mean | 3.5 | **4.0** |",
    ]
    assert list(studies.study_of("image_text").candidates("both-8").values()) == [0.004, 0.008, 0.016]


def test_only_what_has_seeds_enough_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(studies, "tables", lambda: None)
    for name, seeds in (("reid", 5), ("frozen", 4)):
        columns = {column: [float(seed) for seed in range(seeds)] for column in studies.study_of(name).columns}
        (tmp_path / f"{name}.json").write_text(json.dumps(results_of(columns)))
    studies.publish(tmp_path)
    assert sorted(path.name for path in (tmp_path / "results").glob("*.json")) == ["reid.json"]


def test_tables_replace_only_what_is_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n", encoding="utf-8")
    assert study_report.replace_between(page, "x", "new") and not study_report.replace_between(page, "y", "new")
    assert page.read_text("utf-8") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
