"""Each snippet of the cookbook runs as it stands there, alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

COOKBOOK = Path(__file__).parents[1] / "examples" / "README.md"
SNIPPETS = re.findall(r"^## ([^\n]+)\n(?:(?!^##? ).)*?^```python\n(.*?)^```", COOKBOOK.read_text("utf-8"), re.M | re.S)


def test_no_snippet_is_passed_over() -> None:
    assert len(SNIPPETS) == COOKBOOK.read_text("utf-8").count("```python") == 4


@pytest.mark.parametrize("title, code", SNIPPETS, ids=[title.partition(",")[0] for title, _ in SNIPPETS])
def test_snippet(title: str, code: str) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(code, f"{COOKBOOK.name}: {title}", "exec"), names)
