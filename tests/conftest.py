"""One switch for the whole suite: a GPU that Triton compiles for, or Triton's interpreter on the CPU.

The switch must be thrown before Triton is imported, so it comes before every other import. Set TRITON_INTERPRET
yourself to overrule it.
"""

from __future__ import annotations

import gc
import os
import random
import sys

# A thread a process: workers run side by side, tests start programs, and threads wait for each other's cores.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")  # read when torch and NumPy are imported

import torch  # noqa: E402

if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
    raise RuntimeError("Triton was imported before tests/conftest.py could choose between the GPU and the interpreter")


def _gpu_for_triton() -> bool:
    """Ampere or newer, or an AMD data-centre GPU."""
    if not torch.cuda.is_available():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)


os.environ.setdefault("TRITON_INTERPRET", "0" if _gpu_for_triton() else "1")
# cuBLAS gives the same bits twice only with a fixed workspace, read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Fresh data in every run; the workers of `pytest -n` inherit the run's seed through the environment.
SEED = int(os.environ.setdefault("GSSF_TEST_SEED", str(random.SystemRandom().randrange(2**31))))

from collections.abc import Iterator  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from support.interpreter import remember_lookups  # noqa: E402
from support.poison import poisoned_memory  # noqa: E402

from gssf_triton.backend import HAS_TRITON, TRITON_VERSION  # noqa: E402
from gssf_triton.kernels import choice  # noqa: E402

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1"

# The interpreter takes milliseconds where a GPU takes microseconds, and there most examples compile a kernel of their
# own: no deadline, and few examples.
settings.register_profile(
    "gssf",
    deadline=None,
    max_examples=7 if INTERPRETED else 25,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gssf")

# The tensors are small: threads would only get into each other's way, and into the other workers'.
torch.set_num_threads(1)
if INTERPRETED and HAS_TRITON:
    remember_lookups()


def pytest_report_header(config: pytest.Config) -> str:
    where = "interpreter, CPU" if INTERPRETED else torch.cuda.get_device_name()
    triton = f"Triton {TRITON_VERSION} on {where}" if HAS_TRITON else f"NO KERNEL IS TESTED, Triton: {TRITON_VERSION}"
    return f"gssf_triton: torch {torch.__version__}, {triton}; repeat this run's data with GSSF_TEST_SEED={SEED}"


#: What imports kernels cannot even be collected without Triton.
collect_ignore = ["test_compile_gate.py", "test_first_tasks.py", "test_tensor_cores.py", "test_tuner_choice.py"]
if HAS_TRITON:
    collect_ignore.clear()


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not walk over it in every test that calls it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # modules are taken apart at exit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Triton, or with one that is too old, the torch backend is what there is to test."""
    for item in items if not HAS_TRITON else ():
        if item.get_closest_marker("kernels"):
            item.add_marker(pytest.mark.skip(reason=f"needs Triton's kernels: {TRITON_VERSION}"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a test lie."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="session", params=["torch", "triton"] if HAS_TRITON else ["torch"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both backends wherever Triton is installed: its kernels run on the GPU, or in the interpreter."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _same_data_in_every_order() -> None:
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _no_override_is_left() -> Iterator[None]:
    yield
    assert choice._overrides == (), "the tests that follow would run with these configurations"


@pytest.fixture(scope="session", autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """Fresh buffers hold NaN, not lucky zeros: an output element that no program writes fails its test."""
    with poisoned_memory():
        yield
