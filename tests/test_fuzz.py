"""A budgeted part of `make fuzz`: fixed cases of every function; and what is broken on purpose is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.cases import FAMILIES
from fuzz.draw import Draw
from fuzz.loop import main, run_case
from torch import Tensor

import gssf_triton
from gssf_triton import metrics, nn
from gssf_triton.losses import info_nce
from gssf_triton.retrieval import scan
from gssf_triton.similarity import functional, torch_backend

#: Of each function; the number times the functions is what a run of the tests has time for.
CASES = 4


@pytest.mark.parametrize("function", FAMILIES)
def test_cases_hold(function: str) -> None:
    for seed in range(CASES):
        result = run_case(seed, function)
        assert not result.error, f"{result.command}\n{result.error}"


def test_every_public_function_is_fuzzed() -> None:
    """A function or module that is added is added to the fuzzer."""
    modules = {"nn.GSSF", "nn.GSSFAttention", "nn.losses"}
    wanted = {name for name in gssf_triton.__all__ if callable(getattr(gssf_triton, name))}
    wanted |= {f"metrics.{name}" for name in metrics.__all__} | modules
    assert set(FAMILIES) == wanted
    assert set(nn.__all__) == {"GSSF", "GSSFAttention", "InfoNCELoss", "SigmoidLoss", "TripletLoss", "DistillationLoss"}


def test_a_seed_is_a_case() -> None:
    """The same tensors, layouts and gradients, to the last bit."""
    for function in ("pairwise_sim", "info_nce"):
        one, other = (FAMILIES[function](Draw(5)) for _ in range(2))
        assert one.tags == other.tags and one.mode == other.mode  # type: ignore[attr-defined]
        for name, x in one.tensors.items():  # type: ignore[attr-defined]
            y = other.tensors[name]  # type: ignore[attr-defined]
            assert (x is None and y is None) or (x.equal(y) and x.stride() == y.stride())


# ---------------------------------------------------------------- broken on purpose

Patch = pytest.MonkeyPatch


def _slightly_off(patch: Patch) -> None:
    """As if a product ran in TF32."""
    exact = torch_backend.product
    patch.setattr(torch_backend, "product", lambda *args: exact(*args) * (1 + 1e-4))


def _one_gradient_missing(patch: Patch) -> None:
    """Normalisation that gradients do not flow through."""

    def unit_rows(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True).clamp_min(1e-12)

    patch.setattr(torch_backend, "unit_rows", unit_rows)


def _input_written(patch: Patch) -> None:
    """Features that come back scaled."""
    exact = functional.joined

    def scaled(*features: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            features[0].mul_(2)
        return exact(*features)

    patch.setattr(functional, "joined", scaled)


def _nan_hidden(patch: Patch) -> None:
    exact = torch_backend.product
    patch.setattr(torch_backend, "product", lambda *args: exact(*args).nan_to_num())


def _last_row_unwritten(patch: Patch) -> None:
    """Memory that nobody wrote."""
    exact = torch_backend.product

    def shortened(*args: Any) -> Tensor:
        S = exact(*args)
        return torch.cat((S[..., :-1, :], torch.empty_like(S[..., -1:, :])), -2)

    patch.setattr(torch_backend, "product", shortened)


def _ids_ignored(patch: Patch) -> None:
    """Pairs of equal ids count as negatives."""
    loss = info_nce.__globals__["_InfoNCE"]
    exact = loss.stream

    def forgetful(self: Any, name: str, x: Any, *more: Any, **options: Any) -> Any:
        return exact(self, name, x._replace(row_ids=None, column_ids=None), *more, **options)

    patch.setattr(loss, "stream", forgetful)


def _other_bits(patch: Patch) -> None:
    """Noise far below every tolerance."""
    exact = torch_backend.fold_plainly
    patch.setattr(torch_backend, "fold_plainly", lambda *args: exact(*args) * (1 + 1e-6 * torch.rand(()).double()))


def _ties_by_the_higher_index(patch: Patch) -> None:
    exact = scan.Search.best_items

    def reversed_lists(search: Any, k: int) -> Any:
        lists = exact(search, k)
        indices = lists.indices
        if k > 1:
            indices[:, :2] = indices[:, :2].flip(1)
        return lists

    patch.setattr(scan.Search, "best_items", reversed_lists)


def _a_copy_shares_its_weights(patch: Patch) -> None:
    patch.setattr(nn.GSSF, "__deepcopy__", lambda self, memo: self, raising=False)


BREAKS: list[tuple[str, Callable[[Patch], None]]] = [
    ("pairwise_sim", _slightly_off),
    ("pairwise_sim", _one_gradient_missing),
    ("pairwise_sim", _input_written),
    ("pairwise_sim", _nan_hidden),
    ("pairwise_sim", _last_row_unwritten),
    ("info_nce", _ids_ignored),
    ("paired_sim", _other_bits),
    ("topk", _ties_by_the_higher_index),
    ("nn.GSSF", _a_copy_shares_its_weights),
]


@pytest.mark.parametrize(("function", "broken"), BREAKS, ids=lambda x: x if isinstance(x, str) else x.__name__[1:])
def test_what_is_broken_is_found(function: str, broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    """Within so many cases, by a promise that it breaks; the same cases pass where nothing is broken."""
    broken(monkeypatch)
    found = (run_case(seed, function) for seed in range(60))
    first = next((result for result in found if result.error), None)
    assert first is not None, "nothing was found"
    assert "Traceback" not in first.error, first.error
    monkeypatch.undo()
    assert not run_case(first.seed, function).error


# ---------------------------------------------------------------- the command


def test_a_failure_is_written_down_with_its_command(tmp_path: Path, monkeypatch: Patch, capsys: Any) -> None:
    _input_written(monkeypatch)
    arguments = ["--function", "paired_sim", "--start", "0", "--cases", "3", "--out", str(tmp_path)]
    assert main(arguments) == 1
    written = (tmp_path / "failures.txt").read_text()
    assert "python tests/fuzz --case 0 --function paired_sim" in written
    assert "paired_sim wrote to its input a" in written
    printed = capsys.readouterr().out
    assert "3 cases" in printed and (tmp_path / "report.txt").read_text() in printed


def test_one_case_again_from_the_command_line() -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "tests/fuzz", "--case", "3", "--function", "dense_metric"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stderr
