"""What only shows after a while: memory and files over thousands of steps, and a training killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

#: GSSF_TEST_STEPS=10000 is the whole promise, some minutes on a busy machine.
LONG = int(os.environ.get("GSSF_TEST_STEPS", "1500"))
EXAMPLES = Path(__file__).parents[1] / "examples"

#: Steps of ever other sizes: a cache that is filed under a size would grow. Prints what is held early and at the end.
STEPS = """
import gc, json, os, sys
import torch, gssf_triton
from gssf_triton.kernels import choice
from gssf_triton.nn import GSSF, InfoNCELoss, SigmoidLoss, TripletLoss

steps, sizes, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if backend == "triton":
    sys.path.append(sys.argv[4])
    from support.interpreter import remember_lookups
    remember_lookups()
torch.set_num_threads(1)
torch.manual_seed(0)
losses = [kind(GSSF(16, block_size=4), backend=backend) for kind in (InfoNCELoss, SigmoidLoss, TripletLoss)]
head = torch.nn.Linear(16, 16)
optimizer = torch.optim.Adam([*head.parameters(), *(p for loss in losses for p in loss.parameters())], lr=1e-3)

def held():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    tensors = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    return {"MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "tensors": tensors, "objects": len(gc.get_objects()),
            "files": len(os.listdir("/proc/self/fd")), "remembered": len(choice._remembered)}

for step in range(steps):
    N = 3 + step % sizes
    a, b = torch.randn(N, 16), torch.randn(N, 16)
    losses[step % 3](head(a), b).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        W = losses[0].metric.W_diag.detach()
        gssf_triton.topk(a, b, W, k=2, backend=backend)
        gssf_triton.late_interaction(a[None], b[None], W, backend=backend)
    if step + 1 == 30 * sizes // 2:  # every loss has met every size, five times at least
        early = held()
print(json.dumps([early, held()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process holds from /proc")
@pytest.mark.parametrize(
    ("backend", "steps", "sizes"), [("torch", LONG, 29), pytest.param("triton", 30, 1, marks=pytest.mark.kernels)]
)
def test_many_steps_hold_memory_flat(backend: str, steps: int, sizes: int) -> None:
    command = [sys.executable, "-c", STEPS, str(steps), str(sizes), backend, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    early, late = json.loads(done.stdout)
    assert late["files"] == early["files"]
    assert late["tensors"] == early["tensors"]
    # Objects: one leaked a step would be thousands.
    assert late["objects"] - early["objects"] < 0.5 * (steps - 15 * sizes), (early, late)
    assert late["MiB"] - early["MiB"] < 4, (early, late)
    assert late["remembered"] == early["remembered"]


#: The example's training, a line a step; with a teacher of nothing, it is whole on its own.
TRAINING = """
import sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from glyph_training import Run, Settings, test_pairs
from gssf_triton.data.glyphs import load_glyphs

torch.set_num_threads(1)
glyphs = load_glyphs(progress=False)
train, test = glyphs.only(np.arange(0, len(glyphs.names), 50)).split(held_out=40)
# Every step is saved: many a kill meets a file half written.
settings = Settings(steps=12, batch_size=16, dim=32, block_size=8, evaluations=12, held_out=40)
for path in sys.argv[2:]:
    run = Run(settings, "both", 0, train, test_pairs(test), torch.device("cpu"), Path(path))
    print("from", run.step, flush=True)
    for measured in run.train():
        print("step", flush=True)
    torch.save({"history": run.history, "weights": run.model.state_dict()}, path + ".end")
"""


def train(*checkpoints: Path, kill_after: int | None = None) -> int:
    """Run one training after another, or kill the first after so many steps; the step that it resumed from."""
    command = [sys.executable, "-c", TRAINING, str(EXAMPLES), *map(str, checkpoints)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        start = child.stdout.readline()
        for number, _ in enumerate(child.stdout, start=1):
            if number == kill_after:
                child.send_signal(signal.SIGKILL)
                break
        errors = child.stderr.read()
        status = child.wait()
    assert status in (0, -signal.SIGKILL), errors
    return int(start.split()[1])


def test_a_training_killed_at_any_moment_ends_in_the_same_bits(tmp_path: Path) -> None:
    import torch

    starts = [train(tmp_path / "cut.pt", kill_after=random.randint(1, 9))]
    starts.append(train(tmp_path / "cut.pt", tmp_path / "whole.pt"))
    assert starts[0] == 0 and starts == sorted(starts) and starts[-1] > 0, starts
    whole, cut = (torch.load(tmp_path / f"{name}.pt.end", weights_only=True) for name in ("whole", "cut"))
    assert cut["history"] == whole["history"]
    for name, weight in whole["weights"].items():
        assert torch.equal(cut["weights"][name], weight), name
