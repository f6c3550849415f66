"""Compile what public calls launch, without their GPUs, and check it for what makes kernels wrong or slow.

`python -m gssf_triton.autotune.compile_gate` makes the calls of `public_calls.gated` on the stub of each architecture,
compiles every distinct launch, and fails on each that breaks one of `RULES`. Exit status: 0, or 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from unittest import mock

from gssf_triton import console
from gssf_triton.autotune import workloads
from gssf_triton.autotune.compiled import Compiled, compile_launch
from gssf_triton.autotune.public_calls import NUMERICS, float32_precision, gated
from gssf_triton.autotune.rehearsal import Launch, Record, recording
from gssf_triton.autotune.stub import CUDA
from gssf_triton.autotune.tables import Table, shipped
from gssf_triton.autotune.ttgir import Access
from gssf_triton.kernels import toolchain
from gssf_triton.kernels.choice import TORCH_KERNELS
from gssf_triton.kernels.configs import padded_block
from gssf_triton.kernels.release import TRITON_RELEASE
from gssf_triton.kernels.targets import ARCHITECTURES, MAX_GRID
from gssf_triton.progress import bar

#: Bytes a lane moves at a time if strides allow it, and a warp's shortest run that wastes no part of a sector.
VECTOR_BYTES, SECTOR_BYTES = 16, 32


@dataclass(frozen=True)
class Case:
    """A launch of a public call: the largest grid it was seen with, and the first call that made it."""

    launch: Launch
    grid: tuple[int, ...]
    call: str


def _error(case: Case, made: Compiled) -> str | None:
    return f"does not compile: {made.facts.error}" if made.facts.error else None


def _shared(case: Case, made: Compiled) -> str | None:
    limit = ARCHITECTURES[case.launch.arch].shared_bytes
    if made.facts.shared > limit:
        return f"needs {made.facts.shared:,} bytes of shared memory, a block has {limit:,}"
    return None


def _spills(case: Case, made: Compiled) -> str | None:
    return f"spills ({made.facts.spills:,})" if made.facts.spills else None


def _tensor_cores(case: Case, made: Compiled) -> str | None:
    arch = ARCHITECTURES[case.launch.arch]
    wanting = [dot for dot in made.dots if dot.wants_tensor_cores or (arch.backend == "hip" and dot.dtype != "f64")]
    if any(dot.rows >= arch.tensor_rows for dot in wanting) and not made.facts.tensor_ops:
        return f"has no {arch.tensor_instruction} instruction"
    if wanting and not made.facts.tensor_ops and not made.facts.mma_sync:
        return "has no tensor-core instruction"
    return None


def _serialised(case: Case, made: Compiled) -> str | None:
    return f"is serialised: {made.facts.serialised[0]}" if made.facts.serialised else None


def _hazard(case: Case, made: Compiled) -> str | None:
    return f"overwrites an operand that is still being read: {made.facts.hazards[0]}" if made.facts.hazards else None


def _grid(case: Case, made: Compiled) -> str | None:
    over = [programs for programs, most in zip(case.grid, MAX_GRID, strict=False) if programs > most]
    return f"a grid of {over[0]:,} programs in a dimension" if over else None


def _chained(case: Case, made: Compiled) -> str | None:
    if case.launch.arch.startswith("sm_10") and made.facts.chained and TRITON_RELEASE < toolchain.SOUND_TRITON:
        return "chains products into one accumulator, which this Triton gets wrong"
    return None


def _register_operands(case: Case, made: Compiled) -> str | None:
    taken = sum(registers for _, _, registers in made.facts.wgmma)
    if not taken:
        return None
    launch = case.launch
    if not toolchain.toolchain(launch.arch).is_safe:
        return f"{taken} products take an operand from registers, which this assembler may overwrite"
    # `toolchain` must know every such launch, or it could not prevent it with other assemblers.
    if not toolchain.variant_of(launch.kernel, launch.arguments()).takes_registers:
        return f"{taken} products take an operand from registers, and `kernels.toolchain` does not know it"
    return None


#: (kernel, argument) → why its tiles are not moved 16 bytes at a time.
NARROW = {
    ("late_interaction", "out_ptr"): "the R weights of an image begin at any multiple of R",
}
#: (architecture, kernel, numerics) → why its operands' loads are not asynchronous.
SYNCHRONOUS = {
    (arch, kernel, "fp32/tf32"): "rounded in registers on its way to the product"
    for arch, kernel in (("sm_80", "fold"), ("sm_80", "paired"), ("sm_90", "fold"))
}


def _tiles(case: Case, made: Compiled) -> Iterable[Access]:
    """The accesses of tiles whose strides allow wide moves."""
    launch = case.launch
    if not all(name in launch.values or launch.is_divisible(name) for name in launch.strides):
        return
    is_amd = ARCHITECTURES[launch.arch].backend == "hip"
    for access in made.facts.accesses:
        large = len(access.shape) >= 2 and min(access.shape) > 1
        # Triton's AMD backend stores a product as the matrix cores hold it.
        if large and access.per_thread * access.bits // 8 >= VECTOR_BYTES and not (is_amd and access.kind == "store"):
            yield access


def _describe(access: Access) -> str:
    shape = "×".join(map(str, access.shape))
    return f"{access.kind} of {shape} {access.bits}-bit numbers of {access.argument}"


def _narrow(case: Case, made: Compiled) -> str | None:
    for access in _tiles(case, made):
        if access.vector_bytes < VECTOR_BYTES and (case.launch.short_name, access.argument) not in NARROW:
            return f"{_describe(access)} moves {access.vector_bytes} bytes a lane"
    return None


def _across(case: Case, made: Compiled) -> str | None:
    for access in _tiles(case, made):
        if access.run_bytes < min(SECTOR_BYTES, access.shape[-1] * access.bits // 8):
            return f"{_describe(access)}: a warp's run is {access.run_bytes} bytes long"
    return None


def _synchronous(case: Case, made: Compiled) -> str | None:
    launch = case.launch
    if ARCHITECTURES[launch.arch].backend == "hip" or dict(launch.options)["num_stages"] < 2:
        return None
    if (launch.arch, launch.short_name, launch.numerics) in SYNCHRONOUS:
        return None
    for access in _tiles(case, made):
        if access.kind == "load" and access.in_loop and access.feeds_dot:
            return f"{_describe(access)} in a loop is not asynchronous"
    return None


@dataclass(frozen=True)
class Rule:
    """A property that a launch must have; `broken` returns the fault as text, or None."""

    name: str
    broken: Callable[[Case, Compiled], str | None]


RULES = (
    Rule("compiles", _error),
    Rule("shared memory", _shared),
    Rule("spills", _spills),
    Rule("tensor cores", _tensor_cores),
    Rule("serialised", _serialised),
    Rule("narrow accesses", _narrow),
    Rule("synchronous loads", _synchronous),
    Rule("strided warps", _across),
    Rule("grid", _grid),
    Rule("register hazard", _hazard),
    Rule("register operands", _register_operands),
    Rule("chained products", _chained),
)


def faults(case: Case, made: Compiled) -> list[str]:
    """The faults of a compiled launch, as texts; empty if it has none."""
    if made.facts.error:
        return [_error(case, made) or ""]
    return [text for rule in RULES if (text := rule.broken(case, made))]


def _collect(found: dict[Launch, Case], record: Record, call: str) -> None:
    for launch, grid in record.launches:
        known = found.get(launch)
        if known is None:
            found[launch] = Case(launch, grid, call)
        elif max(grid) > max(known.grid):
            found[launch] = replace(known, grid=grid)


def cases_of(arch: str, chosen: Iterable[str] = tuple(NUMERICS)) -> list[Case]:
    """The distinct launches of the gate's calls on an architecture, and of the configurations that only tables hold."""
    found: dict[Launch, Case] = {}
    with recording(arch) as tape:
        for numerics in chosen:
            for call in gated(arch, numerics):
                for record in call.rehearse(tape, numerics):
                    _collect(found, record, f"{call.name}, {numerics}")
    tiles = {(launch.kernel, launch.numerics, launch.tile) for launch in found}
    for table in shipped():
        if table.arch == arch:
            cases = table_cases(table, chosen)
            found |= {
                case.launch: case
                for case in cases
                if (case.launch.kernel, case.launch.numerics, case.launch.tile) not in tiles
            }
    return list(found.values())


def table_cases(table: Table, chosen: Iterable[str] = tuple(NUMERICS)) -> list[Case]:
    """The distinct launches of a table's configurations, each at one of the keys that have it."""
    if table.arch not in ARCHITECTURES:
        return []
    alike = {
        (key.kernel, key.dtype, padded_block(key.B), bool(key.N), entry.config): key
        for key, entry in table.entries.items()
        if key.dtype in chosen and key.kernel not in ("plan", "gradient_plan", *TORCH_KERNELS)
    }
    found: dict[Launch, Case] = {}
    with recording(table.arch) as tape:
        for (*_, config), key in alike.items():
            # What this toolchain would compile wrongly is never launched, so there is nothing to check.
            with float32_precision(NUMERICS[key.dtype][1]), suppress(toolchain.NotLaunched):
                workloads.build(key, CUDA)(config)()
            _collect(found, tape.cut(), f"{key}, of {table.slug}")
    return list(found.values())


HEADER = (
    f"{'target':7} {'kernel':24} {'dtype':11} {'tile':28} {'regs':>4} {'progs':>5} {'shared':>8} {'spill':>5} "
    f"{'mma':>4} verdict"
)


def render_row(case: Case, made: Compiled, verdict: str) -> str:
    launch, facts = case.launch, made.facts
    return (
        f"{launch.arch:7} {launch.name:24} {launch.numerics:11} {launch.tile:28} {facts.registers:4d} "
        f"{facts.programs_per_sm:5d} {facts.shared:8,d} {facts.spills:5,d} {facts.tensor_ops or facts.mma_sync:4d} "
        f"{verdict}"
    )


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes without Triton's interpreter and with an empty cache of kernels: a stale hit would prove nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="gssf-gate-") as cache:
        environment["TRITON_CACHE_DIR"] = cache
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        ):
            yield pool


def compile_all(launches: Sequence[Launch], jobs: int, *, instructions: bool = False) -> dict[Launch, Compiled]:
    """Compile in `jobs` processes, with a progress bar; `instructions`: see `compile_launch`."""
    made: dict[Launch, Compiled] = {}
    with _workers(jobs) as pool:
        futures = {pool.submit(compile_launch, launch, instructions): launch for launch in launches}
        for future in bar(as_completed(futures), total=len(futures), unit="kernel", desc="compiling"):
            made[futures[future]] = future.result()
    return made


def all_cases(architectures: Sequence[str], numerics: Sequence[str], jobs: int) -> list[Case]:
    """The cases of several architectures, each recorded in a process."""
    with _workers(min(jobs, len(architectures))) as pool:
        found = pool.map(cases_of, architectures, [numerics] * len(architectures))
        return [case for cases in found for case in cases]


def run(cases: Sequence[Case], jobs: int, verbose: bool = True) -> int:
    """Compile the cases, print the table, and return the number of faulty ones."""
    made = compile_all([case.launch for case in cases], jobs)
    failed = 0
    print(HEADER)
    for case in cases:
        found = faults(case, made[case.launch])
        failed += bool(found)
        if verbose or found:
            print(render_row(case, made[case.launch], "; ".join(found) or "ok"))
            if found:
                print(f"{'':8}launched by {case.call}")
    print(f"compile gate: {len(cases) - failed} passed, {failed} failed, {len(RULES)} rules")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    console.ready()
    parser = argparse.ArgumentParser(prog="gssf_triton.autotune.compile_gate", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), help="targets")
    parser.add_argument(
        "--numerics", nargs="+", choices=list(NUMERICS), default=list(NUMERICS), help="dtypes and precisions"
    )
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="print only what fails")
    args = parser.parse_args(argv)
    cases = [
        case
        for case in all_cases(args.arch, args.numerics, args.jobs)
        if not args.kernel or case.launch.short_name in args.kernel
    ]
    if not cases:
        parser.error(f"no kernel is named {', '.join(args.kernel)}")
    return 1 if run(cases, args.jobs, verbose=not args.quiet) else 0


if __name__ == "__main__":
    sys.exit(main())
