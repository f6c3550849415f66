"""The examples in the docstrings of `autotune/`, which lies beside the package that pytest collects docstrings from."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import gssf_triton.autotune

MODULES = sorted(
    module.name for module in pkgutil.iter_modules(gssf_triton.autotune.__path__) if module.name != "__main__"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(f"gssf_triton.autotune.{name}")
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [importlib.import_module(f"gssf_triton.autotune.{name}") for name in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 10
