"""Threads, streams, forked and spawned workers, and processes killed while they write: nothing lost, nothing wrong.

Triton's interpreter itself is not safe for threads: a launch replaces the functions of `triton.language` for as long as
it runs, and another thread's launch meets them half replaced. So the kernels run in threads on a GPU alone; here it is
torch's backend, and what comes before a launch: lazy imports and the look-up of configurations. Tuning caches have
their own tests in test_tuner_store.py.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.file_writers import LETTERS, WRITERS, read_glyphs
from support.forks import forked
from support.good_calls import FUNCTIONS, MODULES, Call

from gssf_triton.autotune import store
from gssf_triton.data import glyphs
from gssf_triton.kernels import choice, devices
from gssf_triton.kernels.configs import ChunkConfig

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"
THREADS, TIMES = 4, 3


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What `work(number)` returns in each of several threads that start together; an error in one is raised here."""
    barrier, results, errors = threading.Barrier(count), [None] * count, []

    def run(number: int) -> None:
        try:
            # PyTorch tells a new thread how many threads its products may use only when it first needs to know itself:
            # the first product may be summed in another order, by as many threads as there are cores.
            torch.set_num_threads(1)
            barrier.wait()
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]
    return results


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors, and numbers, of whatever a call returns."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    if isinstance(result, dict):
        return [torch.tensor(value) for value in result.values()]
    return [x for part in result if part is not None for x in tensors(part)]


def same(found: Any, wanted: Any) -> bool:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    return bool(pairs) and all(torch.equal(x, y) or bool((x.isnan() & y.isnan()).all()) for x, y in pairs)


# ---------------------------------------------------------------------------------------------------------- threads

COMPUTING: dict[str, Call] = FUNCTIONS | {name: call for name, call in MODULES.items() if call.bound is not None}
BACKENDS = ["torch"] if INTERPRETED else ["torch", "triton"]


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("name", COMPUTING)
def test_threads_on_shared_tensors_get_the_bits_of_one_alone(name: str, chosen: str, device: str) -> None:
    call = COMPUTING[name]
    function, arguments = call.callable(device), call.arguments(device)
    if "backend" in call.kinds:
        arguments["backend"] = chosen
    (alone,) = in_threads(lambda number: function(**arguments), 1)
    for found in in_threads(lambda number: [function(**arguments) for _ in range(TIMES)]):
        assert all(same(x, alone) for x in found)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("name", ["pairwise_sim", "info_nce", "sigmoid_loss", "triplet_loss", "late_interaction"])
def test_gradients_in_threads(name: str, chosen: str, device: str) -> None:
    call = FUNCTIONS[name]
    arguments = call.arguments(device) | {"backend": chosen}
    leaves = [x.requires_grad_() for x in arguments.values() if isinstance(x, torch.Tensor) and x.is_floating_point()]

    def gradients(number: int) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(call.function(**arguments).sum(), leaves)

    (alone,) = in_threads(gradients, 1)
    assert all(same(found, alone) for found in in_threads(gradients))


FIRST_USE = """
import hashlib, sys, threading, warnings
COUNT = 8
barrier, seen, errors = threading.Barrier(COUNT), [], []
sys.setswitchinterval(1e-5)

def work(number):
    try:
        barrier.wait()
        import torch
        import gssf_triton
        torch.set_num_threads(1)
        x = torch.arange(96.0).reshape(4, 24).sin()
        W_diag, W_blocks = torch.linspace(0, 1, 24), torch.linspace(-1, 1, 192).reshape(3, 8, 8)
        ids = torch.arange(4)
        parts = [
            gssf_triton.pairwise_sim(x, x, W_diag, W_blocks),
            gssf_triton.info_nce(x, x, W_diag, W_blocks, logit_scale=3.0),
            gssf_triton.topk(x, x, W_diag, W_blocks, k=2)[1],
            gssf_triton.ranks(x, x, W_diag, W_blocks, query_ids=ids, gallery_ids=ids),
            gssf_triton.late_interaction(x[None], x[None], W_diag, W_blocks),
            gssf_triton.nn.GSSF(24, 8)(x, x).detach(),
        ]
        from gssf_triton.kernels import choice
        cpu = torch.device("cpu")
        chosen = [choice.choose("chunk", cpu, torch.float32, 4096, 4096, 64),
                  choice.choose("pairwise", cpu, torch.float32, 64, 64, 32, 8)]
        from gssf_triton.kernels import cross_attention, fold, late_interaction, pairwise, rank, stream, topk
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.numpy().tobytes())
        seen.append(digest.hexdigest() + repr(chosen))
    except BaseException as error:
        errors.append(repr(error))

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    threads = [threading.Thread(target=work, args=(i,)) for i in range(COUNT)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    barrier = threading.Barrier(1)
    alone = threading.Thread(target=work, args=(0,))
    alone.start(); alone.join()
assert not errors, errors
assert len(seen) == 9 and len(set(seen)) == 1, seen
print(sum("cannot be used" in str(w.message) for w in said))
"""


@pytest.mark.kernels
def test_the_first_use_in_many_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports, the reading of the tables and of a broken cache, in a fresh process: one answer, one warning."""
    monkeypatch.setenv("GSSF_CACHE_DIR", str(tmp_path))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("GSSF_AUTOTUNE", None)
    path = store.path_for(devices.identify_for_torch(torch.device("cpu")))  # of one thread, as in the process
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text("{broken", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1" and len(list(path.parent.glob("*.broken-*"))) == 1


def test_a_look_up_while_another_threads_override_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its override ends right after this thread has begun to look through those in force."""
    monkeypatch.setattr(choice, "_overrides", ())  # what it was comes back in the end
    where = ("chunk", torch.device("cpu"), torch.float32, 512, 512, 256)
    usual, tried = choice.choose(*where), ChunkConfig(512, 2048)
    override = choice.use(chunk=tried)

    class Ending(dict[str, Any]):
        def __contains__(self, kernel: object) -> bool:
            override.__exit__(None, None, None)
            return False

    with choice.use(chunk=usual):
        override.__enter__()
        monkeypatch.setattr(choice, "_overrides", (*choice._overrides, Ending()))
        assert choice.choose(*where) == tried, "as it was when the look began"
    assert choice.choose(*where) == usual


if not INTERPRETED:  # there are streams on a GPU only: nowhere else is this a test

    @pytest.mark.parametrize("name", ["pairwise_sim", "info_nce", "topk", "ranks", "late_interaction", "attention"])
    def test_streams_at_once_get_the_bits_of_one_alone(name: str, backend: str) -> None:
        """Each stream makes its own input late, behind a long product: who does not wait for its stream reads zeros."""
        call = FUNCTIONS[name]
        arguments = call.arguments("cuda") | {"backend": backend}
        leading = next(iter(arguments))
        alone = call.function(**arguments)
        torch.cuda.synchronize()
        slow, found = torch.randn(4096, 4096, device="cuda"), []
        streams = [torch.cuda.Stream() for _ in range(4)]
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = torch.zeros_like(arguments[leading])
                slow @ slow
                late += arguments[leading]
                found.append(call.function(**arguments | {leading: late}))
        torch.cuda.synchronize()
        assert all(same(x, alone) for x in found)


# ------------------------------------------------------------------------------------------------------------ forks


def test_data_loader_workers(tmp_path: Path) -> None:
    """As users have them, forked and spawned: the parent has computed on several threads, the workers read and compute.

    A forked child must not use OpenMP's threads after its parent has: it would wait for threads that are not there.
    `DataLoader` sets its workers to one thread, so it is safe; a bare `multiprocessing` process under "fork" is not,
    with any PyTorch code, unless `torch.set_num_threads(1)` is the first thing it does.
    """
    folder = tmp_path / "f30k_precomp"
    folder.mkdir()
    np.save(folder / "dev_ims.npy", np.random.default_rng().normal(size=(6, 5, 32)).astype(np.float32))
    (folder / "dev_caps.txt").write_text("a caption .\n" * 30)
    script = Path(__file__).with_name("support") / "data_loading.py"
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stdout == "fork: the same bits\nspawn: the same bits\n", done.stderr


HELD = """
import os, sys, threading, time, fcntl
from pathlib import Path
import torch
torch.set_num_threads(1)
from gssf_triton.autotune import lookup
from gssf_triton.kernels import choice
from gssf_triton.kernels.configs import ChunkConfig
from gssf_triton.kernels.devices import Device
from gssf_triton.autotune.store import Store

def choose():
    return choice.choose("chunk", torch.device("cpu"), torch.float32, 512, 512, 256)

usual = choose()
choice.forget()
store = Store(Device("cpu-1", "a CPU", "cpu"), Path(sys.argv[1]))
held, done = threading.Event(), threading.Event()

def tune():
    with lookup.lock, lookup.tuning(), choice.use(chunk=ChunkConfig(512, 2048)), choice._lock, store._locked():
        held.set()
        done.wait()

thread = threading.Thread(target=tune)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    ok = choose() == usual and not lookup.is_tuning
    os.write(1, b"ready " if ok else b"wrong ")  # in one piece: the parent writes to the same pipe
    time.sleep(60)
    os._exit(0)
done.set()
thread.join()
try:
    with open(store.path.with_name(store.path.name + ".lock"), "a") as handle:
        deadline = time.monotonic() + 10
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(1, b"free ")
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.write(1, b"still locked ")
                    break
                time.sleep(0.01)
    time.sleep(0.5)
finally:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""


def test_a_fork_while_another_thread_tunes(tmp_path: Path) -> None:
    """The child looks configurations up, and has neither lock nor half-done tuning; the file's lock is freed."""
    environment = os.environ | {"GSSF_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", HELD, str(tmp_path / "cpu-1.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["free", "ready"]


# ----------------------------------------------------------------------------------------- processes and their files


@pytest.mark.kernels
def test_writers_killed_at_any_moment_leave_whole_files(tmp_path: Path) -> None:
    """Two processes write the same files over and over, are killed, and are read all the while: always one content."""
    chance = random.Random(torch.initial_seed())
    for name, (write, _) in WRITERS.items():
        write(tmp_path / name, "A")

    def read_all() -> set[str]:
        found = {read(tmp_path / name) for name, (_, read) in WRITERS.items()}
        assert found <= set(LETTERS)
        return found

    seen: set[str] = set()
    with forked("file_writers.write_for_ever", tmp_path) as nursery:
        for _ in range(4):
            for process in nursery.start(*LETTERS):
                deadline = time.monotonic() + chance.uniform(0, 0.1)
                while time.monotonic() < deadline:
                    seen |= read_all()
                os.kill(process, signal.SIGKILL)
            assert nursery.end() == [-signal.SIGKILL] * 2
            seen |= read_all()
    assert seen == set(LETTERS), "they did write"
    for name, (write, read) in WRITERS.items():
        write(tmp_path / name, "B")
        assert read(tmp_path / name) == "B", "what a killed writer left is no obstacle"


@pytest.mark.kernels
def test_processes_that_build_one_cache_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is none, or a broken one."""
    from PIL import Image

    monkeypatch.setenv("GSSF_CACHE_DIR", str(tmp_path))
    for number, name in enumerate("ab"):
        Image.new("RGB", (64, 64), (number, 100, 200)).save(tmp_path / f"{name}.png")
    with forked("file_writers.load_from_one_cache", tmp_path) as nursery:
        for attempt in range(4):
            nursery.start(*range(4))
            (tmp_path / "start").touch()
            assert nursery.end() == [0] * 4
            assert read_glyphs(glyphs.cache_path()) == "A"
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "half-written files are left"
            (tmp_path / "start").unlink()
            (kept,) = tmp_path.glob("photographs-*")
            for path in (kept, glyphs.cache_path()):
                if attempt % 2:
                    path.unlink()
                else:
                    path.write_bytes(b"half a file")
