"""Compile everything the package can launch, for GPUs that are not there, and hold it to what a GPU would demand.

`python -m gssf_triton.autotune.compile_gate` compiles every kernel for sm_80, sm_90, sm_100 and gfx942, in bfloat16,
float16 and float32 (exact and TF32), in the configurations of `configs` and of the tables that ship, some of which
stand for others that compile alike (`launches` says which). It fails on code that does not compile, wants more shared
memory than a block has, spills registers, or leaves the tensor cores idle where it should use them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from gssf_triton.autotune.launches import Launch, all_launches
from gssf_triton.autotune.resources import Resources, compile_launch
from gssf_triton.autotune.targets import ARCHITECTURES


def faults(launch: Launch, resources: Resources) -> list[str]:
    """What keeps a compiled launch from shipping, in words; empty where nothing does."""
    limit = ARCHITECTURES[launch.arch].shared_bytes
    found: list[str] = []
    if resources.error:
        found.append(f"does not compile: {resources.error}")
        return found
    if resources.shared > limit:
        found.append(f"needs {resources.shared:,} bytes of shared memory, a block has {limit:,}")
    if resources.spills > 0:
        found.append(f"spills ({resources.spills:,})")
    if launch.wants_tensor_cores and resources.tensor_ops == 0:
        found.append(f"has no {launch.tensor_instruction} instruction")
    return found


def render_row(launch: Launch, resources: Resources, verdict: str) -> str:
    return (
        f"{launch.arch:7} {launch.kernel:16} {launch.numerics:5} {launch.variant:22} {launch.config_text:34} "
        f"{resources.registers:5d} {resources.shared:8,d} {resources.spills:6,d} {resources.tensor_ops:6d}  {verdict}"
    )


HEADER = (
    f"{'target':7} {'kernel':16} {'dtype':5} {'variant':22} {'config':34} "
    f"{'regs':>5} {'shared':>8} {'spills':>6} {'mma':>6}  verdict"
)


def run(launches: Sequence[Launch], jobs: int, verbose: bool = True) -> int:
    """Compile the launches in `jobs` processes, print the table, and return the number of faulty ones."""
    from tqdm import tqdm

    results: dict[Launch, Resources] = {}
    with tempfile.TemporaryDirectory(prefix="gssf-gate-") as cache:
        # Compilation needs decorators that compile, and a cache of its own: a stale hit would prove nothing.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(compile_launch, launch): launch for launch in launches}
            for future in tqdm(as_completed(futures), total=len(futures), unit="kernel", desc="compile gate"):
                results[futures[future]] = future.result()
    failed = 0
    print(HEADER)
    for launch in launches:
        found = faults(launch, results[launch])
        failed += bool(found)
        if verbose or found:
            print(render_row(launch, results[launch], "; ".join(found) or "ok"))
    print(f"compile gate: {len(launches) - failed} passed, {failed} failed")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gssf_triton.autotune.compile_gate", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES), help="targets")
    parser.add_argument("--kernel", nargs="+", help="only these kernels")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--quiet", action="store_true", help="print only what fails")
    args = parser.parse_args(argv)
    launches = [x for x in all_launches(args.arch) if not args.kernel or x.kernel in args.kernel]
    if not launches:
        parser.error(f"no kernel is named {', '.join(args.kernel)}")
    return 1 if run(launches, args.jobs, verbose=not args.quiet) else 0


if __name__ == "__main__":
    sys.exit(main())
