"""Machines without platformdirs, without a home, without a disk to write to: all calls run, at most one warning.

A user without a home is a number that the password file lacks, in an environment without HOME: the password file is
replaced here, so that the tests mean the same whoever runs them.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import os
import pwd
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.good_calls import FUNCTIONS
from support.tuner_kit import CPU, a_chunk, measured, stream_key
from test_glyphs import same

from gssf_triton import storage
from gssf_triton.autotune import lookup
from gssf_triton.autotune.cli import main
from gssf_triton.backend import HAS_TRITON
from gssf_triton.data import Glyphs, glyphs
from gssf_triton.kernels.devices import INTERPRETER, identify_for_torch

BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]
KEY = stream_key()


def no_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        patch.delenv(name, raising=False)
    patch.setattr(pwd, "getpwuid", unknown)


def no_platformdirs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setitem(sys.modules, "platformdirs", None)  # importing it raises ModuleNotFoundError


def neither(patch: pytest.MonkeyPatch, folder: Path) -> None:
    no_platformdirs(patch, folder)
    no_home(patch, folder)


def no_home_for_an_older_platformdirs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    no_home(patch, folder)
    patch.setitem(sys.modules, "platformdirs", SimpleNamespace(user_cache_dir=lambda name: f"~/.cache/{name}"))


def below_a_file(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").write_text("in the way", encoding="utf-8")
    patch.setenv("GSSF_CACHE_DIR", str(folder / "file" / "cache"))


def read_only_disk(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(path: object, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    real_open = builtins.open
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(os, "mkdir", refuse)
    patch.setattr(
        builtins, "open", lambda path, mode="r", *rest, **options: (
            refuse(path) if set(mode) & set("wax+") else real_open(path, mode, *rest, **options)
        ),
    )  # fmt: skip


def another_users_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A home that may not even be searched, as /root for a container's user: every look into it is refused."""

    def refused(real: Callable[..., object]) -> Callable[..., object]:
        def look(path: object, *arguments: object, **options: object) -> object:
            if str(path).startswith(str(folder / "home")):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *arguments, **options)

        return look

    patch.setenv("HOME", str(folder / "home"))
    patch.delenv("XDG_CACHE_HOME", raising=False)
    for module, name in ((os, "stat"), (os, "mkdir"), (builtins, "open"), (importlib.import_module("io"), "open")):
        patch.setattr(module, name, refused(getattr(module, name)))


#: Machine → (what makes it, warnings of reading, whether results can be kept).
MACHINES: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], int, bool]] = {
    "no home": (no_home, 0, False),
    "no platformdirs": (no_platformdirs, 0, True),
    "neither": (neither, 0, False),
    "no home, an older platformdirs": (no_home_for_an_older_platformdirs, 0, False),
    "below a file": (below_a_file, 1, False),
    "a read-only disk": (read_only_disk, 0, False),
    "another user's folder": (another_users_folder, 1, False),
}


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Nothing looked up or warned of before, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GSSF_CACHE_DIR", raising=False)
    monkeypatch.delenv("GSSF_AUTOTUNE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_warned", set())
    lookup.forget()
    with monkeypatch.context() as patch:
        MACHINES[request.param][0](patch, tmp_path)
        yield request.param
    lookup.forget()
    assert not (tmp_path / "~").exists(), "a home that is not there is no folder's name"


def test_calls_and_commands_run_and_cost_at_most_one_warning(
    machine: str, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, reading, keeps = MACHINES[machine]
    tiny = Glyphs(*(torch.ones(2, 32, 32).byte().numpy(), *(torch.arange(2).numpy(),) * 2, ("A", "B"), ("f", "g")))
    monkeypatch.setattr(glyphs, "render", lambda progress=True: tiny)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", module="gssf_triton|test_bare_machine")
        for name in ("info_nce", "pairwise_sim", "topk"):
            for backend in BACKENDS:
                FUNCTIONS[name].function(**FUNCTIONS[name].arguments(device), backend=backend)
        mine = [w for w in caught if "cannot be used" in str(w.message)]
        assert len(mine) == reading

        # Two devices' results, for as long as the process lives at least.
        here = identify_for_torch(CPU)
        for where in (here, INTERPRETER):
            lookup.learn(where, {KEY: a_chunk()})
            lookup.learn(where, {KEY: a_chunk(1024), stream_key(64): a_chunk()})
            assert lookup.entries_for(where) == {KEY: a_chunk(), stream_key(64): a_chunk()}, "the earlier one stays"
            assert lookup.store_for(where).read() == lookup.entries_for(where)
        lookup.learn(here, {KEY: measured(a_chunk(256).config)}, overwrite=True)
        assert lookup.store_for(here).read()[KEY] == a_chunk(256)
        for command in ("doctor", "show --shape 8x8x8x0", "tune --shape 8x8x8x0 --dtype fp32 --quiet --candidates 1"):
            assert main([*command.split(), "--device", "cpu"]) == 0
        assert main(["export", "--device", "cpu", "--out", "-"]) == 0
        mine = [w for w in caught if "cannot be used" in str(w.message)]
        assert len(mine) == (0 if keeps else 1), [str(w.message) for w in caught]

        for _ in range(2):
            assert same(glyphs.load_glyphs(progress=False), tiny)
        mine = [w for w in caught if "glyph set" in str(w.message)]
        assert len(mine) == (0 if keeps else 1), [str(w.message) for w in caught]
    lookup.forget()
    assert (lookup.store_for(here).read().get(KEY) == a_chunk(256)) == keeps
    said = capsys.readouterr().out
    assert ("no cache directory" in said) == (storage.cache_folder() is None)


@pytest.mark.parametrize("chosen", ["", "/somewhere", "some/where"])
def test_the_usual_place_is_where_platformdirs_puts_it(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results stay where they are when it is installed, or removed; a relative $XDG_CACHE_HOME counts for nothing."""
    monkeypatch.delenv("GSSF_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", chosen)
    found = storage.cache_folder()
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert storage.cache_folder() == found
    monkeypatch.setenv("GSSF_CACHE_DIR", "here")
    assert storage.cache_folder() == Path("here")


def test_every_public_call_runs_in_a_process_without_platformdirs_and_home(tmp_path: Path) -> None:
    """Hidden from every finder, nothing in the environment but what Python needs."""
    program = f"""
import os, pwd, sys

class Without:
    def find_spec(self, name, *arguments):
        if name.split(".")[0] == "platformdirs":
            raise ModuleNotFoundError("No module named 'platformdirs'", name=name)

def unknown(uid):
    raise KeyError(uid)

sys.meta_path.insert(0, Without())
pwd.getpwuid = unknown
assert not os.environ.keys() & {{"HOME", "XDG_CACHE_HOME", "GSSF_CACHE_DIR"}}
sys.path[:0] = {[path for path in sys.path if path]!r}
from support.good_calls import FUNCTIONS
for call in FUNCTIONS.values():
    for chosen in [dict(backend=backend) for backend in {BACKENDS}] if "backend" in call.kinds else [dict()]:
        call.callable("cpu")(**call.arguments("cpu"), **chosen)
from gssf_triton.autotune.cli import main
assert main(["doctor", "--device", "cpu"]) == 0
"""
    environment = {"PATH": os.environ.get("PATH", ""), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error:the tuning cache", "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no cache directory" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.kernels
def test_tritons_cache_moves_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from gssf_triton.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "cache"))
    launch.find_room.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton's cache .*file/cache cannot be written"):
            launch.find_room()
        assert os.access(triton.knobs.cache.dir, os.W_OK)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            launch.find_room()  # asked once a process
        usable = str(tmp_path / "kernels")
        monkeypatch.setattr(triton.knobs.cache, "dir", usable)
        launch.find_room.cache_clear()
        launch.find_room()
        assert triton.knobs.cache.dir == usable
    finally:
        launch.find_room.cache_clear()
