"""What a release and a contributor's tools are told once more agrees with the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

import gssf_triton

ROOT = Path(__file__).resolve().parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def loaded(name: str) -> Any:
    return yaml.safe_load(text(name))


def test_one_version() -> None:
    assert 'version = { attr = "gssf_triton.__version__" }' in text("pyproject.toml")
    sections = re.findall(r"^## (.+)$", text("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "[Unreleased]"
    citation = loaded("CITATION.cff")
    assert citation["version"] == gssf_triton.__version__
    assert sections[1] == f"[{citation['version']}] - {citation['date-released']}"


def test_the_paper_is_the_one_that_the_package_names() -> None:
    (paper,) = loaded("CITATION.cff")["references"]
    assert f'Paper = "{paper["url"]}"' in text("pyproject.toml")
    assert paper["url"].rpartition("/")[2] in str(gssf_triton.__doc__)


def test_the_hook_runs_the_pinned_ruff() -> None:
    (ruff,) = (repo for repo in loaded(".pre-commit-config.yaml")["repos"] if repo["repo"].endswith("/ruff-pre-commit"))
    assert f"\nruff=={ruff['rev'].removeprefix('v')}\n" in text("constraints.txt")


def test_the_workflow_runs_ci_on_every_python() -> None:
    workflow = loaded(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == ".ci/run"
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text("pyproject.toml"))
    assert job["strategy"]["matrix"]["python"] == supported


def test_every_docstring_example_is_collected() -> None:
    """Also those of kernels/ and autotune/, by way of the links; a module that cannot be imported would be left out."""
    # The integrations' conftest comes first, as in `make test`: timm needs what it registers for torchvision.
    folders = ["tests/integrations", "gssf_triton"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder, links in (("gssf_triton", ""), ("kernels", "gssf_triton/"), ("autotune", "gssf_triton/")):
        texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")}
        wanted = {f"{links}{path.relative_to(ROOT)}" for path, text in texts.items() if ">>> " in text}
        assert wanted and wanted <= set(re.findall(r"^(\S+\.py)::", done.stdout, re.MULTILINE))
