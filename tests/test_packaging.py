"""A built wheel, installed away from the checkout, is the whole package: what users get, not what lies here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import gssf_triton

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("gssf_triton", "kernels", "autotune", "pyproject.toml", "README.md", "LICENSE")

# Neither `site` (-S: no editable install's import hook) nor the environment nor the working directory (-I) may help:
# the package comes from the wheel, its dependencies from the folders given.
USE_THE_WHEEL = """
import sys
wheel, dependencies = sys.argv[1], sys.argv[2:]
sys.path[:0] = [wheel]
sys.path += dependencies
import importlib.util, torch, gssf_triton, gssf_triton.kernels.configs, gssf_triton.kernels, gssf_triton.nn

for module in (gssf_triton, gssf_triton.kernels.configs, gssf_triton.kernels, gssf_triton.nn):
    assert module.__file__.startswith(wheel), module.__file__
assert importlib.util.find_spec("kernels") is None and importlib.util.find_spec("autotune") is None

a, b = torch.arange(8.0).reshape(2, 4), torch.arange(12.0).reshape(3, 4).sin()
W_diag, W_blocks = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.arange(8.0).reshape(2, 2, 2).cos()
expected = a @ (torch.diag(W_diag) + torch.block_diag(*W_blocks)) @ b.T
torch.testing.assert_close(gssf_triton.pairwise_sim(a, b, W_diag, W_blocks), expected)
print(gssf_triton.__version__)
"""


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


#: What a build dates the wheel's files by, in seconds since 1970.
DATE = "1700000000"


def _wheel(source: Path, folder: Path) -> Path:
    _run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--wheel-dir", folder, source),
        cwd=folder,
        SOURCE_DATE_EPOCH=DATE,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, links as links: a build leaves its traces in the tree it runs in."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True)
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _wheel(source, tmp_path_factory.mktemp("wheel"))


def test_a_wheel_built_again_has_the_same_bytes(wheel: Path, source: Path, tmp_path: Path) -> None:
    """From a source archive, which holds the linked folders where the links were; its files have other dates."""
    for path in source.rglob("*"):
        path.touch()
    make = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    _run(sys.executable, "-c", make, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    again = _wheel(archive, tmp_path)
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> str:
    (name,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def test_wheel_holds_every_module(names: set[str]) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "gssf_triton").rglob("*.py")}
    for folder in ("kernels", "autotune"):
        expected |= {f"gssf_triton/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    tables = (ROOT / "autotune" / "tables").glob("*.json")
    expected |= {"gssf_triton/py.typed"} | {f"gssf_triton/{path.relative_to(ROOT)}" for path in tables}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_wheel_installs_one_top_level_name(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gssf_triton"}


def test_wheel_carries_the_license(names: set[str]) -> None:
    assert any(re.search(r"\.dist-info/licenses/LICENSE$", name) for name in names)


def test_metadata_asks_for_torch_numpy_and_platformdirs_alone(metadata: str) -> None:
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert sorted(line for line in required if "extra ==" not in line) == ["numpy", "platformdirs>=4", "torch>=2.8"]
    assert f"\nVersion: {gssf_triton.__version__}\n" in metadata


def test_wheel_brings_the_command(wheel: Path, names: set[str]) -> None:
    (name,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(name).decode() == "[console_scripts]\ngssf-triton = gssf_triton.command:main\n"


def test_installed_wheel_computes(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    _run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel),
        cwd=tmp_path,
    )
    dependencies = {str(Path(str(module.__file__)).parents[1]) for module in (torch, np)}
    version = _run(sys.executable, "-I", "-S", "-c", USE_THE_WHEEL, site, *dependencies, cwd=tmp_path)
    assert version.strip() == gssf_triton.__version__


# Python started in a clone finds the clone's package first, wherever else one is installed.
USE_THE_CLONE = """
import sys
clone, wheel, *dependencies = sys.argv[1:]
sys.path[:0] = [clone, wheel, *dependencies]
import gssf_triton.autotune.cli, gssf_triton.command, gssf_triton.kernels.toolchain, torch

for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "gssf_triton":
        assert module.__file__.startswith(clone), module
print(gssf_triton.pairwise_sim(torch.eye(2), torch.eye(2), torch.tensor([2.0, 3.0])).tolist())
"""


@pytest.mark.parametrize("name", ["clone", "wheel"])
def test_a_clone_beside_an_installed_wheel_is_whole(name: str, wheel: Path, tmp_path: Path) -> None:
    clone, site = tmp_path / "clone", tmp_path / "site"
    clone.mkdir()
    for folder in ("gssf_triton", "kernels", "autotune"):
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    dependencies = {str(Path(str(module.__file__)).parents[1]) for module in (torch, np)}
    first, second = (clone, site) if name == "clone" else (site, clone)
    printed = _run(sys.executable, "-I", "-S", "-c", USE_THE_CLONE, first, second, *dependencies, cwd=tmp_path)
    assert printed.strip() == "[[2.0, 0.0], [0.0, 3.0]]"


@pytest.mark.parametrize("folder", ["kernels", "autotune"])
def test_environment_knows_the_folders_as_subpackages_alone(folder: str) -> None:
    """However the package was installed here, editable or not: `kernels` is another package's name."""
    program = (
        "import sys, importlib.util; spec = importlib.util.find_spec(sys.argv[1]); "
        "assert spec is None or not (spec.origin or '').startswith(sys.argv[2]), spec"
    )
    _run(sys.executable, "-I", "-c", program, folder, ROOT, cwd=ROOT.parent)
