"""The front door: every snippet of README.md runs, every link leads somewhere, every table is what the runs say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    ROOT / "perf/NOTES.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_snippets_run(tmp_path: Path) -> None:
    """In order, in one process: a later one may use what an earlier one made."""
    blocks = _blocks(ROOT / "README.md", "python")
    assert blocks
    script = tmp_path / "readme.py"
    script.write_text("import torch\n\ntorch.manual_seed(0)\n" + "\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """In `code`, from the top of the repository: `kernels/tile.py`, `perf/results/`."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("build", "runs"))
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("script", ["report", "demo_report"])
def test_figures_are_what_the_runs_say(script: str) -> None:
    """perf/report.py and examples/demo_report.py."""
    assert importlib.import_module(script).main(["--check"]) == 0
