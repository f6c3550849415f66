"""`gssf-triton`, and `python -m gssf_triton`.

Exit status: 0 success, 2 bad usage or bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import gssf_triton
from gssf_triton import console
from gssf_triton.command.evaluate import add_evaluate
from gssf_triton.command.search import add_search
from gssf_triton.command.usage import Help, Parser, UsageError

DESCRIPTION = """\
Rank and search with GSSF, a learned similarity at the cost of cosine.

Features are .npy arrays, one row an item; they are memory-mapped. A metric is an .npz archive with W_diag (D,) and
W_blocks (G, B, B), or one of them: numpy.savez("metric.npz", W_diag=W_diag.detach().cpu().numpy(), …).
"""
EPILOG = """\
examples:
  gssf-triton evaluate image-text images.npy texts.npy --weights metric.npz
  gssf-triton evaluate retrieval embeddings.npy --labels labels.npy --cosine
  gssf-triton search queries.npy gallery.npy --weights metric.npz -k 5 --images images/ --sheet best.html

`gssf-triton COMMAND --help` lists a command's options.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gssf-triton",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {gssf_triton.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_evaluate(commands)
    add_search(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    console.ready()
    args = build_parser().parse_args(argv)

    def say(message: Warning | str, *where: object, **more: object) -> None:
        stream = sys.stdout if console.leads_to(sys.stderr, args.out) else sys.stderr
        print(f"{args.prog}: warning: {' '.join(str(message).split())}", file=stream)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = say
            return int(args.run(args))
    except UsageError as fault:
        print(f"{args.prog}: {' '.join(str(fault).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.prog}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The results' reader has closed the pipe.
        console.give_up_output()
        return 0
    except OSError as fault:
        print(f"{args.prog}: {fault}", file=sys.stderr)
        return 2
