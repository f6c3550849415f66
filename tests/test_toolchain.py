"""Kernels that the installed compiler would compile wrongly are never launched, and what runs instead is right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.toolchain_kit import (  # noqa: F401
    DOUBLE,
    HALF,
    NEW,
    OLD,
    SINGLE,
    every_operator,
    hopper,
    install,
    nothing_remembered,
)
from support.tuner_kit import CPU, H100, cache, measured, pretend  # noqa: F401

from gssf_triton.autotune import lookup
from gssf_triton.autotune.cli import main
from gssf_triton.autotune.space import make_key
from gssf_triton.kernels import choice, devices, toolchain
from gssf_triton.kernels.choice import force_plan
from gssf_triton.kernels.configs import FoldConfig
from gssf_triton.kernels.devices import Device
from gssf_triton.kernels.plans import PlanChoice, as_compiled
from gssf_triton.kernels.release import TRITON_RELEASE
from gssf_triton.kernels.toolchain import Assembler, Toolchain, may_launch, variant_of

pytestmark = pytest.mark.kernels

#: One of the two chooses sm_90's assembler, depending on Triton's version.
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def a_ptxas(folder: Path, version: str) -> Path:
    """A program that reports this version of ptxas."""
    path = folder / f"ptxas-{version}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.33'\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def take(patch: pytest.MonkeyPatch, path: Path) -> None:
    for variable in VARIABLES:
        patch.setenv(variable, str(path))


# ------------------------------------------------------------------------------------------------------ the assembler


@pytest.mark.parametrize(
    ("version", "is_safe"), [("12.8", False), ("12.9", False), ("13.0", False), ("13.1", True), ("14.0", True)]
)
def test_the_assembler_is_the_one_triton_takes(
    version: str, is_safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_ptxas(tmp_path, version)
    take(monkeypatch, path)
    monkeypatch.setattr(toolchain, "_bundled", lambda: [])
    found = toolchain.toolchain("sm_90")
    assert found.assembler == Assembler(str(path), tuple(map(int, version.split("."))))
    assert found.is_safe == found.assembler.is_safe == is_safe


def test_an_assembler_that_cannot_be_run_counts_as_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_ptxas(tmp_path, "13.4")
    path.chmod(0o644)
    take(monkeypatch, path)
    monkeypatch.setattr(toolchain, "_bundled", lambda: [])
    found = toolchain.toolchain("sm_90")
    assert found.assembler.version is None and not found.is_safe
    assert "Permission denied" in toolchain.describe("sm_90")


def test_it_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(toolchain, "_of_triton", lambda code: asked.append(code) or NEW)
    assert toolchain.toolchain("sm_90") == toolchain.toolchain("sm_90") == Toolchain(NEW)
    assert asked == [90]


def test_a_newer_assembler_that_triton_carries_is_used_for_us_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    from gssf_triton.kernels import launch

    old, new = a_ptxas(tmp_path, "12.8"), a_ptxas(tmp_path, "13.3")
    take(monkeypatch, old)
    monkeypatch.setenv("PTXAS_OPTIONS", "--verbose")
    monkeypatch.setattr(toolchain, "_bundled", lambda: [Assembler(str(new), (13, 3))])
    monkeypatch.setattr(launch, "identify", lambda where: H100)
    found = toolchain.toolchain("sm_90")
    assert found == Toolchain(Assembler(str(old), (12, 8)), Assembler(str(new), (13, 3))) and found.is_safe
    environment = dict(os.environ)
    used, inside = [], threading.Barrier(2)

    class Kernel:
        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.start

        def start(self, **arguments: object) -> None:
            used.append((self.__name__, get_ptxas(90).path, arguments.get("ptx_options")))
            if "both" in arguments:
                inside.wait(timeout=60)
            assert dict(os.environ) == environment

    from gssf_triton.kernels.args import Blocks, Matrix, Tile, Weights

    blocks = Weights(None, Blocks(None, 1, 1, 1))
    arguments = {"x": Matrix(torch.empty(1, dtype=HALF), None, 1, 1), "TILE": Tile(64)}

    config = FoldConfig(16, 16, num_warps=4, num_stages=1)

    def fold(**more: object) -> None:
        launch.launch(Kernel("fold_kernel"), (1,), CPU, config, **arguments, weights=blocks, **more)

    fold()
    launch.launch(Kernel("fold_kernel"), (1,), CPU, config, **arguments, weights=Weights(None, None))
    launch.launch(Kernel("stream_kernel"), (1,), CPU, config, **arguments)
    option = "--verbose --regAllocOptLevel=2"
    assert used == [
        ("fold_kernel", str(new), option),
        ("fold_kernel", str(old), None),
        ("stream_kernel", str(old), None),
    ]
    threads = [threading.Thread(target=fold, kwargs={"both": True}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used[3:] == [("fold_kernel", str(new), option)] * 2
    assert get_ptxas(90).path == str(old)


#: Compiles a launch with register operands, and one without, as on a GPU of sm_90.
COMPILED = """
import torch, gssf_triton
from gssf_triton.autotune import stub
from gssf_triton.kernels.configs import FoldConfig
from gssf_triton.kernels.choice import force_plan

with stub.stub_host("sm_90"), stub.stub_driver("sm_90"):
    a, W_diag, W_blocks = torch.zeros(128, 64).bfloat16(), torch.zeros(64), torch.zeros(2, 32, 32)
    for plan in ("one_pass", "fold_product"):
        with force_plan(plan):
            gssf_triton.pairwise_sim(a, a, W_diag, W_blocks, out_dtype=torch.float32, backend="triton")
"""


def test_compiled_kernels_with_register_operands_are_the_newer_assemblers(tmp_path: Path) -> None:
    """If Triton takes an old one, only kernels that read registers are compiled by the newer one."""
    bundled = toolchain._bundled()
    if not bundled[0].is_safe:
        assert TRITON_RELEASE < (3, 7)
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)} | dict.fromkeys(VARIABLES, bundled[-1].path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    # Newer assemblers leave their name in their output.
    newer = {
        path.with_suffix(".ptx"): b"Cuda compilation tools" in path.read_bytes() for path in tmp_path.glob("*/*.cubin")
    }
    registers = {ptx: bool(re.search(r"wgmma\.mma_async[^;]*?}, {", ptx.read_text("utf-8"))) for ptx in newer}
    assert newer == registers and sorted(newer.values()) == [False, True, True]


def test_an_assembler_chosen_by_a_knob_is_back_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    chosen, new = a_ptxas(tmp_path, "13.0"), a_ptxas(tmp_path, "13.3")
    for knob in ("ptxas", "ptxas_blackwell"):
        monkeypatch.setitem(vars(knobs.nvidia), knob, str(chosen))
    with toolchain._in_use(str(new)):
        assert get_ptxas(90).path == str(new)
    assert get_ptxas(90).path == str(chosen)


def test_a_carried_assembler_that_triton_does_not_take_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, a_ptxas(tmp_path, "12.8"))
    monkeypatch.setattr(toolchain, "_bundled", lambda: [NEW])  # no such file
    assert toolchain.toolchain("sm_90").replacement is None


def test_the_assemblers_that_triton_carries_are_found() -> None:
    found = toolchain._bundled()
    assert found and all(tool.version and Path(tool.path).name.startswith("ptxas") for tool in found)
    assert found == sorted(found, key=lambda tool: tool.version or (), reverse=True)


# ------------------------------------------------------------------------------------------------------ the predicate

#: Kernel, dtype, weights; whether tensor cores may read registers, with exact float32 and with TF32.
EXPOSED = [
    ("pairwise", HALF, "", False, False),
    ("pairwise", HALF, "diag", True, True),
    ("pairwise", HALF, "blocks", True, True),
    ("pairwise", SINGLE, "blocks", False, True),
    ("pairwise", DOUBLE, "diag+blocks", False, False),
    ("fold", HALF, "diag", False, False),
    ("fold", HALF, "blocks", True, True),
    ("fold", SINGLE, "diag+blocks", False, True),
    ("paired", HALF, "diag+blocks", False, False),
    ("paired", SINGLE, "diag+blocks", False, True),
    ("gradient", HALF, "diag", False, False),
    ("gradient", HALF, "blocks", True, True),
    ("gradient", SINGLE, "blocks", True, True),
    ("gradient", DOUBLE, "blocks", False, False),
    ("cross_attention", HALF, "", True, True),
    ("cross_attention", SINGLE, "", True, True),
    ("cross_attention", DOUBLE, "", False, False),
    ("stream", HALF, "", False, False),
    ("late_interaction", SINGLE, "", False, False),
]


def allowed(kernel: str, dtype: torch.dtype, kind: str, device: torch.device = CPU) -> bool:
    return may_launch(kernel, dtype, device, has_diag="diag" in kind, has_blocks="blocks" in kind)


@pytest.mark.filterwarnings("ignore:some kernels are left")
@pytest.mark.parametrize(("kernel", "dtype", "kind", "exact", "tf32"), EXPOSED)
def test_register_operands_need_a_safe_assembler(
    kernel: str,
    dtype: torch.dtype,
    kind: str,
    exact: bool,
    tf32: bool,
    on_hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 8))
    for found, carried, is_safe in ((NEW, None, True), (OLD, NEW, True), (OLD, None, False)):
        install(monkeypatch, found, carried)
        toolchain.is_sound.cache_clear()
        toolchain._fault_of.cache_clear()
        for precision, exposed in (("highest", exact), ("high", tf32)):
            torch.set_float32_matmul_precision(precision)
            assert allowed(kernel, dtype, kind) == (is_safe or not exposed)


def test_triton_36_keeps_the_one_pass_kernel_from_any_assembler(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, NEW)
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 6))
    with pytest.warns(UserWarning, match=r"Triton 3\.6 overwrites operands"):
        assert not allowed("pairwise", HALF, "diag")
    assert not allowed("pairwise", HALF, "diag+blocks")
    assert allowed("pairwise", HALF, "") and allowed("fold", HALF, "blocks")


@pytest.mark.parametrize("arch", ["sm_100", "sm_103"])
def test_chained_products_need_a_newer_triton(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)  # an old assembler does not matter here
    with pretend(monkeypatch, Device("a-blackwell", "A Blackwell", arch)):
        monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 8))
        with pytest.warns(UserWarning, match=r"Triton 3\.8 adds chained products"):
            assert not allowed("cross_attention", HALF, "")
        assert not allowed("gradient", SINGLE, "blocks")
        assert allowed("gradient", HALF, "blocks") and allowed("gradient", SINGLE, "diag")
        assert allowed("fold", SINGLE, "blocks") and allowed("pairwise", HALF, "blocks")
        torch.set_float32_matmul_precision("high")
        assert allowed("gradient", SINGLE, "blocks") and allowed("cross_attention", SINGLE, "")
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 9))
        toolchain.is_sound.cache_clear()
        assert allowed("cross_attention", HALF, "") and allowed("gradient", SINGLE, "blocks")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120", "gfx942", "interpreter"])
def test_other_devices_are_asked_nothing(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(arch: str) -> Toolchain:
        raise AssertionError(arch)

    monkeypatch.setattr(toolchain, "toolchain", asked)
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 6))
    with pretend(monkeypatch, Device("another", "Another", arch)):
        assert all(allowed(kernel, dtype, kind) for kernel, dtype, kind, *_ in EXPOSED)


def test_launches_are_judged_by_their_arguments(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' predicate, which knows no tile, and the last check agree on every launch of every operator."""
    from gssf_triton.kernels import launch

    seen: dict[str, set[bool]] = {}
    fake = SimpleNamespace(
        is_watched=lambda kernel: True,
        is_sound=lambda arch: False,
        launch_options=lambda kernel, arguments, arch: seen.setdefault(kernel, set()).add(
            variant_of(kernel, arguments).takes_registers
        ) or toolchain.launch_options(kernel, arguments, arch),
    )  # fmt: skip
    monkeypatch.setattr(launch, "toolchain", fake)
    install(monkeypatch, NEW)
    every_operator(torch.bfloat16)
    assert seen["fold_kernel"] == seen["pairwise_kernel"] == {True, False} and seen["paired_kernel"] == {False}
    assert True in seen["gradient_kernel"] and seen["cross_attention_kernel"] == {True}
    assert seen["late_interaction_kernel"] == seen["topk_kernel"] == seen["stream_kernel"] == {False}
    tile = SimpleNamespace(GRAM_PRECISION="tf32x3", PRECISION="ieee")
    exact = {"x": SimpleNamespace(ptr="*fp32"), "TILE": tile}
    assert variant_of("cross_attention_kernel", exact).chains_products
    assert not variant_of("topk_kernel", exact).chains_products


# --------------------------------------------------------------------------------------------- plans, and the doctor


def test_the_models_plan_is_not_one_pass_where_it_is_serialised(
    cache: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_pass, product = PlanChoice("one_pass", "more"), PlanChoice("fold_product", "more")
    for arch, release, expected in (
        ("sm_90", (3, 6), product),
        ("sm_90", (3, 7), product),
        ("sm_90", (3, 8), one_pass),
        ("sm_80", (3, 6), one_pass),
        ("interpreter", (3, 6), one_pass),
    ):
        assert as_compiled(one_pass, arch, release) == expected

    where = torch.device("cuda", 0)

    def kind_chosen() -> str:
        return choice.choose("plan", where, torch.bfloat16, 64, 64, 1024, 32).kind

    key = make_key("plan", "bf16", 64, 64, 1024, 32, 1)
    install(monkeypatch, NEW)
    for release, kind in (((3, 9), "one_pass"), ((3, 6), "fold_product")):
        monkeypatch.setattr(choice, "TRITON_RELEASE", release)
        for mode in ("cached", "off"):
            monkeypatch.setenv("GSSF_AUTOTUNE", mode)
            with pretend(monkeypatch, H100):
                assert kind_chosen() == kind
                with force_plan("one_pass"):
                    assert kind_chosen() == "one_pass"
    monkeypatch.delenv("GSSF_AUTOTUNE")
    with pretend(monkeypatch, H100):
        lookup.learn(H100, {key: measured(one_pass)})
        assert kind_chosen() == "one_pass"  # what was measured here is true here


@pytest.mark.parametrize(
    ("found", "carried", "follows"),
    [
        (NEW, None, r"ptxas 13\.4 \(/a/new/ptxas\): all kernels run"),
        (OLD, NEW, r"ptxas 12\.8 .*, for kernels with operands in registers ptxas 13\.4 .*: all kernels run"),
        (OLD, None, r"ptxas 12\.8 .*: kernels with operands in registers are left to torch's own operations"),
        (Assembler("not usable: no such file", None), None, r"ptxas unknown .*are left to torch's own operations"),
    ],
)
def test_doctor_names_the_assembler_and_what_follows(
    found: Assembler,
    carried: Assembler | None,
    follows: str,
    cache: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, found, carried)
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 9))
    for device, line in ((H100, "assembler +"), (devices.INTERPRETER, "assembler +for sm_90 it would be ")):
        with pretend(monkeypatch, device):
            assert main(["doctor", "--device", "cpu"]) == 0
        assert re.search(rf"^{line}{follows}", capsys.readouterr().out, re.MULTILINE)


def test_doctor_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.describe("gfx942") == "none for gfx942"
    install(monkeypatch, NEW)
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 8))
    assert "exact float32 in three products is left" in toolchain.describe("sm_100")
    assert toolchain.describe("sm_80").endswith("all kernels run")
    monkeypatch.setattr(toolchain, "TRITON_RELEASE", (3, 6))
    assert "the one-pass kernel is left" in toolchain.describe("sm_90")
