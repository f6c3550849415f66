"""The benchmark cannot rot: costs by hand, operations of any shape, no time for a wrong result, honest clocks.

No test here asserts a time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import report
import sweep
import torch
from support.perf_kit import SHORT, quick

from bench import registry, timing
from bench.cells import PASSES, Cell, Shape, grid
from bench.costs import Cost, cost
from bench.measure import measure
from bench.operation import Contender, Inputs, Operation, Probe, Program, largest_error, relative_error

SHAPE = Shape(24, 40, 32, 8)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


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
        # A loss reads its features and weights, and writes their gradients.
        ("gssf_loss", "forward", 120 + 72, 4 * (32 + 12)),
        ("cosine_loss", "forward+backward", 360, 4 * 32 * 3),
        # A teacher of 6 channels: its product as well, no gradient.
        ("gssf_distillation", "forward+backward", 120 + 180 + 72 + 240 + 144, 4 * (80 + 12) + 4 * (80 + 32 + 24)),
        # Two results a query, a score and an index of 12 bytes together.
        ("gssf_topk", "forward", 120 + 72, 4 * (32 + 12) + 3 * 2 * 12),
        # An id of 8 bytes on each side, and a rank.
        ("cosine_ranks", "forward", 120, 4 * 32 + 8 * (3 + 5) + 8 * 3),
    ],
)
def test_costs_by_hand(mathematics: str, mode: str, flops: int, bytes_: int) -> None:
    assert cost(mathematics, mode, Shape.of(3, 5, 4, 2, E=6, k=2), 4) == Cost(flops, bytes_)


def test_costs_of_region_word_scores_by_hand() -> None:
    # Two images of 3 regions, one caption of 5 words: 30 products of 4 channels, the 5 words folded.
    shape = Shape.of(2, 1, 4, 2, R=3, L=5)
    fold, weights = 5 * 4 * 6, 12
    read = 4 * (6 * 4 + 5 * 4 + weights)
    assert cost("gssf_late_interaction", "forward", shape, 4) == Cost(240 + fold, read + 8)
    both = Cost(240 + fold + 160 + 2 * fold, 3 * read + 16)
    assert cost("gssf_late_interaction", "forward+backward", shape, 4) == both
    # Twice the products; each image's Gram matrix, and its form at every word.
    assert cost("gssf_cross_attention", "forward", shape, 4).flops == 480 + 36 * (4 + 5) + fold


@pytest.mark.parametrize("mathematics", ["cosine", "gssf", "gssf_loss", "gssf_ranks"])
def test_folding_either_side_costs_the_same(mathematics: str) -> None:
    one, other = (cost(mathematics, "forward", Shape(M, N, 4, 2), 2) for M, N in ((3, 5), (5, 3)))
    assert one.flops == other.flops


def test_every_contender_has_a_cost() -> None:
    for operation in registry.OPERATIONS.values():
        shape = operation.shape(Shape(8, 8, 8, 4))
        for contender in operation.contenders:
            for mode in operation.modes:
                assert cost(contender.mathematics, mode, shape, 4).flops > 0


def test_mathematics_of_no_row_is_refused() -> None:
    for name in ("euclid", "gssf_sorting"):
        with pytest.raises(KeyError, match=name):
            cost(name, "forward", SHAPE, 4)


# --- suites ----------------------------------------------------------------------------------------------------------


def test_full_suites_hold_the_shapes_asked_for() -> None:
    gpu = registry.suite_cells("full", "cuda")
    for M, N in ((512, 512), (2048, 2048), (8192, 8192), (32768, 32768), (64, 10**6)):
        for D in (256, 512, 1024):
            for B in (16, 32, 64, 128):
                shape = Shape(M, N, D, B)
                found = {(cell.dtype, cell.mode) for cell in gpu if cell.shape == shape}
                assert found == {(dtype, mode) for dtype in ("bf16", "fp32") for mode in PASSES}
    cpu = registry.suite_cells("full", "cpu")
    bar = Cell("pairwise_sim", "forward+backward", Shape(4096, 4096, 1024, 32), "fp32")
    assert bar in cpu


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", registry.suites())
def test_every_suite_offered_has_cells_on_every_device(suite: str, device_type: str) -> None:
    cells = registry.suite_cells(suite, device_type)
    assert cells and len({cell.key for cell in cells}) == len(cells)
    assert {cell.operation for cell in cells} == set(registry.members(suite))
    for cell in cells:
        operation = registry.OPERATIONS[cell.operation]
        assert cell.mode in operation.modes and operation.shape(cell.shape) == cell.shape


def test_every_suite_belongs_to_the_order() -> None:
    assert {suite for operation in registry.OPERATIONS.values() for suite in operation.suites} <= set(registry.SUITES)


def test_plans_run_apart_on_a_gpu_only() -> None:
    cell = Cell("pairwise_sim", "forward", SHAPE, "fp32")
    on_gpu = {c.name for c in registry.contenders_for(cell, "cuda")}
    on_cpu = {c.name for c in registry.contenders_for(cell, "cpu")}
    assert on_gpu - on_cpu == {"gssf_one_pass", "gssf_fold_product"}


# --- contenders ------------------------------------------------------------------------------------------------------


def test_colour_and_marker_tell_contenders_apart() -> None:
    from bench import plots

    for operation in registry.OPERATIONS.values():
        styles = list(plots.styles(operation).values())
        assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles)
        assert len(styles) == len(operation.contenders)


def test_half_precision_is_checked_and_timed() -> None:
    cell = Cell("pairwise_sim", "forward+backward", Shape(24, 16, 32, 8), "bf16", compiled=False)
    entries = measure(cell, torch.device("cpu"), SHORT, seed=1, wanted=None)["contenders"]
    assert {name: entry["reason"] for name, entry in entries.items()} == dict.fromkeys(entries)
    assert all("seconds" in entry for entry in entries.values())


# --- operations of other shapes and results ---------------------------------------------------------------------------


def _search(off_by: float = 0.0) -> Operation:
    """A toy search: k best items of N for M queries, two results, one of them integers, and no backward pass."""

    def make_inputs(cell: Cell, device: torch.device, generator: torch.Generator) -> Inputs:
        s = cell.shape
        tensors = {n: torch.randn(rows, s.D, generator=generator) for n, rows in (("a", s.M), ("b", s.N))}
        return Inputs({**tensors, "k": torch.tensor(s["k"])}, upstream=torch.ones(()))

    def build(error: float) -> Any:
        def program(inputs: Inputs) -> Program:
            a, b, k = (inputs.tensors[name] for name in "abk")

            def search() -> tuple[torch.Tensor, torch.Tensor]:
                values, indices = torch.topk(a @ b.T, int(k))
                return values * (1 + error), indices

            return Program(
                search, {}, inputs.upstream, read=lambda out: dict(zip(("values", "indices"), out, strict=True))
            )

        return program

    def probes(inputs: Inputs, mathematics: str, mode: str) -> Any:
        S = inputs.tensors["a"].double() @ inputs.tensors["b"].double().T
        best = torch.topk(S, int(inputs.tensors["k"])).values
        yield Probe("values", lambda values: values, best)
        yield Probe("indices", lambda indices: S.gather(1, indices), best)

    shapes = [Shape.of(8, N, 16, 4, k=k) for N, k in ((32, 4), (64, 4), (64, 8))]
    cells = grid("toy_search", shapes, "fp32", modes=["forward"])
    return Operation(
        name="toy_search",
        cells={("toys", "cpu"): cells, ("toys", "cuda"): cells},
        make_inputs=make_inputs,
        contenders=(
            Contender("stored", "all of S", build(0.0), mathematics="cosine_topk"),
            Contender("gssf", "gssf_triton", build(off_by), mathematics="cosine_topk", ours=True),
            Contender("faiss", "another library", build(0.0), mathematics="cosine_topk"),
        ),
        probes=probes,
        yardstick="stored",
        modes=("forward",),
        axes=("N", "k"),
        sizes={"k": 4},
        relative_to="the search of all of S",
        unit="queries",
        count=lambda shape: shape.M,
    )


def test_operations_of_other_shapes_and_results_run_from_suite_to_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.OPERATIONS, "toy_search", _search())
    pairwise = registry.OPERATIONS["pairwise_sim"]
    monkeypatch.setattr(registry, "SUITES", (*registry.SUITES, "toys"))
    few = {("toys", "cpu"): grid("pairwise_sim", [SHAPE], "fp32", compiled=[])}
    monkeypatch.setitem(registry.OPERATIONS, "pairwise_sim", dataclasses.replace(pairwise, cells=few))
    out = tmp_path / "device" / "toys.json"
    assert sweep.main(["--suite", "toys", "--device", "cpu", "--seconds", "0.01", "--out", str(out)]) == 0
    cells = json.loads(out.read_text())["cells"]
    assert "toy_search/forward/fp32/M8-N64-D16-B4-k8" in cells and len(cells) == 5
    cell = cells["toy_search/forward/fp32/M8-N32-D16-B4-k4"]
    assert (cell["k"], cell["unit"], cell["count"]) == (4, "queries", 8)
    assert cell["contenders"]["gssf"]["flops"] == 2 * 8 * 32 * 16
    drawn = {path.name for path in out.parent.glob("*.png")}
    assert {"toys-toy_search-roofline.png", "toys-pairwise_sim-roofline.png"} <= drawn
    assert {"toys-toy_search-relative-fp32.png", "toys-toy_search-memory-fp32.png"} <= drawn
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(report.RESULTS_MARKS), encoding="utf-8")
    assert report.main([str(out), "--readme", str(readme)]) == 0
    rows = [
        line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| forward | fp32 | 8 ×")
    ]
    assert [row.split(" | ")[2:6] for row in rows] == [["8 × 32", "16", "4", "4"], ["8 × 64", "16", "4", "4"]]


def test_integer_results_and_further_sizes_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(registry.OPERATIONS, "toy_search", _search(off_by=1e-3))
    (cell, *_) = registry.custom_cells(["toy_search"], [sweep.parse_shape("8,32,16,4,k=2")], ["fp32"])
    assert cell.shape == Shape.of(8, 32, 16, 4, k=2)
    entries = measure(cell, torch.device("cpu"), SHORT, seed=1, wanted=None)["contenders"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "stored": "ok",
        "gssf": "wrong",
        "faiss": "ok",
    }
    monkeypatch.setattr(registry, "SUITES", (*registry.SUITES, "toys"))
    with pytest.raises(SystemExit) as stopped:
        sweep.main(["--suite", "toys", "--device", "cpu", "--shape", "8,32,16,4,R=2"])
    assert stopped.value.code == 2 and "toy_search has no R" in capsys.readouterr().err


SEARCHES = {
    "topk": Shape.of(30, 900, 32, 8, k=5),
    "ranks": Shape(30, 900, 32, 8),
    "late_interaction": Shape.of(6, 7, 32, 8, R=5, L=4),
    "cross_attention_sim": Shape.of(6, 7, 32, 8, R=5, L=4),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_retrieval_is_held_to_float64(name: str) -> None:
    for mode in registry.OPERATIONS[name].modes:
        cell = Cell(name, mode, SEARCHES[name], "fp32", compiled=False)
        entries = measure(cell, torch.device("cpu"), SHORT, seed=1, wanted=None)
        found = entries["contenders"]
        assert {contender: entry["reason"] for contender, entry in found.items()} == dict.fromkeys(found)
        assert found["gssf"]["seconds"]["median"] > 0 and len(found) > 1


def test_a_wrong_rank_is_noticed() -> None:
    """Ranks are integers that one rounding may move: they are held by the score that stands at their place."""
    operation = registry.OPERATIONS["ranks"]
    cell = Cell("ranks", "forward", SEARCHES["ranks"], "fp32")
    inputs = operation.make_inputs(cell, torch.device("cpu"), torch.Generator().manual_seed(0))
    ours = next(c for c in operation.contenders if c.ours).build(inputs).results("forward")
    (probe,) = operation.probes(inputs, "gssf_ranks", "forward")
    assert largest_error(ours, [probe]) < 1e-6
    assert largest_error({"ranks": ours["ranks"] + 1}, [probe]) > 1e-5


# --- no speed for a wrong result -------------------------------------------------------------------------------------


def _with_contender(monkeypatch: pytest.MonkeyPatch, contender: Contender) -> None:
    operation = registry.OPERATIONS["pairwise_sim"]
    changed = dataclasses.replace(operation, contenders=(*operation.contenders, contender))
    monkeypatch.setitem(registry.OPERATIONS, "pairwise_sim", changed)


@pytest.mark.parametrize("mode", PASSES)
def test_a_wrong_result_has_no_time(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    ours = next(c for c in registry.OPERATIONS["pairwise_sim"].contenders if c.name == "gssf")

    def build(inputs: Inputs) -> Program:
        program = ours.build(inputs)
        correct = program.forward
        program.forward = lambda: correct() * 1.001
        return program

    _with_contender(monkeypatch, Contender("off", "off", build, mathematics="gssf", ours=True))
    cell = Cell("pairwise_sim", mode, SHAPE, "fp32", compiled=False)
    entries = measure(cell, torch.device("cpu"), SHORT, seed=1, wanted=None)["contenders"]
    assert entries["off"]["status"] == "wrong"
    assert "seconds" not in entries["off"]
    assert entries["gssf"]["status"] == "ok"


def test_a_contender_that_cannot_run_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(inputs: Inputs) -> Program:
        raise MemoryError("too large for this machine")

    _with_contender(monkeypatch, Contender("big", "big", build, mathematics="gssf"))
    cell = Cell("pairwise_sim", "forward", SHAPE, "fp32", compiled=False)
    entries = measure(cell, torch.device("cpu"), SHORT, seed=1, wanted=None)["contenders"]
    assert entries["big"]["status"] == "failed"
    assert "too large" in entries["big"]["reason"]
    assert "seconds" in entries["gssf"]


def test_a_nan_is_an_infinite_error() -> None:
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


# --- time and memory -------------------------------------------------------------------------------------------------


def test_rounds_hold_every_contender_once() -> None:
    calls: list[str] = []
    samples = timing.interleave(
        {name: lambda name=name: calls.append(name) for name in "ABC"}, timing.CpuClock(), timing.Effort(4, 4, 0.0)
    )
    assert all(len(found) == 4 for found in samples.values())
    timed = calls[-12:]
    assert all(sorted(timed[i : i + 3]) == ["A", "B", "C"] for i in range(0, 12, 3))


def test_every_sample_starts_with_cold_caches() -> None:
    clock = timing.CpuClock(timing.CPU_FLUSH_BYTES)
    seen: list[int] = []
    samples = [clock.take(lambda: seen.append(int(clock.flush[0]))) for _ in range(3)]
    assert seen == [1, 2, 3] and all(sample.seconds > 0 and sample.host is None for sample in samples)


def test_peak_memory_counts_what_was_held_at_once() -> None:
    def call() -> torch.Tensor:
        x = torch.ones(1000)  # 4,000 bytes
        y = x + 1  # 8,000
        del x
        return y * 2  # 8,000 again

    assert 8000 <= timing.peak_bytes(call, torch.device("cpu")) < 9000
