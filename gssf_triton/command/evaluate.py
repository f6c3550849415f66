"""`gssf-triton evaluate`: the numbers that papers report, from features on disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from gssf_triton import metrics
from gssf_triton.command.files import load_features, load_labels
from gssf_triton.command.metric import add_metric, as_tensor, load_metric
from gssf_triton.command.results import (
    add_output,
    as_csv,
    as_json,
    bar_wanted,
    check_output,
    form_of,
    note,
    write_results,
)
from gssf_triton.command.usage import Help, Parser, UsageError, positive, refusals
from gssf_triton.data.precomputed import CAPTIONS_PER_IMAGE, is_repeated

Protocol = Callable[[argparse.Namespace], dict[str, float]]

EXAMPLES = """\
examples:
  gssf-triton evaluate image-text images.npy texts.npy --weights metric.npz --folds 5
  gssf-triton evaluate reid query.npy gallery.npy --weights metric.npz --query-ids qi.npy --gallery-ids gi.npy \\
      --query-cams qc.npy --gallery-cams gc.npy
  gssf-triton evaluate retrieval embeddings.npy --labels labels.npy --cosine --format csv
"""
IMAGE_TEXT = """\
Recall@K both ways, their sum, median and mean ranks. Images and texts of equal ids match. Without ids, the texts are
taken to be captions in the images' order, equally many an image (five, where there are five times as many). Images
whose rows stand five times, once a caption, are taken once.
"""
REID = """\
mAP, mINP and CMC in Market-1501's protocol: items of the query's identity and camera are not ranked, nor is junk
(id -1); distractors (id 0) are.
"""
RETRIEVAL = """\
Recall@K, MAP@R and R-precision of every row as a query against all others, itself left out.
"""


def _one_of_five(args: argparse.Namespace, images: NDArray[Any]) -> NDArray[Any]:
    note(args, f"IMAGES: {args.images} has every image five times, once a caption: each is taken once")
    return images[::CAPTIONS_PER_IMAGE]


def _image_text(args: argparse.Namespace) -> dict[str, float]:
    images, texts = load_features("IMAGES", args.images), load_features("TEXTS", args.texts)
    repeated = is_repeated(images)
    if (args.image_ids is None) != (args.text_ids is None):
        raise UsageError("--image-ids and --text-ids go together; without both, texts are captions in order")
    if args.image_ids is None:
        if repeated and len(images) == len(texts):
            images = _one_of_five(args, images)
        if len(texts) % max(len(images), 1) or not len(images):
            raise UsageError(
                f"TEXTS: expected equally many captions an image, a multiple of the {len(images)} rows of "
                f"{args.images}, got {len(texts)} rows; or give --image-ids and --text-ids"
            )
        image_ids = torch.arange(len(images))
        text_ids = image_ids.repeat_interleave(len(texts) // len(images))
    else:
        image_ids = load_labels("--image-ids", args.image_ids, len(images), "IMAGES")
        text_ids = load_labels("--text-ids", args.text_ids, len(texts), "TEXTS")
        first_ids = image_ids[::CAPTIONS_PER_IMAGE]
        if repeated and torch.equal(image_ids, first_ids.repeat_interleave(CAPTIONS_PER_IMAGE)):
            images, image_ids = _one_of_five(args, images), first_ids
    metric = load_metric(args, images)
    with refusals():
        return metrics.image_text(
            as_tensor(images, metric.device),
            as_tensor(texts, metric.device),
            image_ids=image_ids.to(metric.device),
            text_ids=text_ids.to(metric.device),
            ks=args.ks,
            folds=args.folds,
            progress=bar_wanted(args),
            **metric.options,
        )


def _reid(args: argparse.Namespace) -> dict[str, float]:
    queries, gallery = load_features("QUERIES", args.queries), load_features("GALLERY", args.gallery)
    labels: dict[str, Any] = {
        f"{side}_{kind}": load_labels(f"--{side}-{kind}", getattr(args, f"{side}_{kind}"), len(rows), of)
        for kind in ("ids", "cams")
        for side, rows, of in (("query", queries, "QUERIES"), ("gallery", gallery, "GALLERY"))
    }
    metric = load_metric(args, queries)
    with refusals():
        return metrics.reid(
            as_tensor(queries, metric.device),
            as_tensor(gallery, metric.device),
            ks=args.ks,
            progress=bar_wanted(args),
            **{name: values.to(metric.device) for name, values in labels.items()},
            **metric.options,
        )


def _retrieval(args: argparse.Namespace) -> dict[str, float]:
    embeddings = load_features("EMBEDDINGS", args.embeddings)
    labels = load_labels("--labels", args.labels, len(embeddings), "EMBEDDINGS")
    metric = load_metric(args, embeddings)
    with refusals():
        return metrics.retrieval(
            as_tensor(embeddings, metric.device),
            labels.to(metric.device),
            ks=args.ks,
            progress=bar_wanted(args),
            **metric.options,
        )


def run(args: argparse.Namespace) -> int:
    check_output(args)
    found = args.protocol(args)
    text = as_json(found) if form_of(args) == "json" else as_csv(("metric", "value"), found.items())
    write_results(args, text)
    return 0


def add_evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="the metrics of a protocol: image-text, reid or retrieval",
        description="Evaluate features on disk in a protocol of the field, in percent.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    protocols = command.add_subparsers(required=True, metavar="PROTOCOL", parser_class=Parser)

    def add(
        name: str,
        protocol: Callable[[argparse.Namespace], dict[str, float]],
        short: str,
        text: str,
        ks: tuple[int, ...],
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = protocols.add_parser(name, help=short, description=text, formatter_class=Help)
        parser.set_defaults(run=run, protocol=protocol, prog=parser.prog)
        usual = " ".join(map(str, ks))
        parser.add_argument(
            "--ks", type=positive(int), nargs="+", default=ks, metavar="K", help=f"cut-offs (default: {usual})"
        )
        return parser

    def npy(parser: argparse.ArgumentParser, name: str, text: str, **options: Any) -> None:
        if name.startswith("--"):
            parser.add_argument(name, type=Path, metavar="NPY", help=text, **{"required": True, **options})
        else:
            parser.add_argument(name, type=Path, metavar=name.upper(), help=text)

    parser = add("image-text", _image_text, "Recall@K both ways, rsum, median and mean ranks", IMAGE_TEXT, (1, 5, 10))
    npy(parser, "images", "image features, .npy (I, D): the metric's left side")
    npy(parser, "texts", "text features, .npy (T, D)")
    npy(parser, "--image-ids", "integers (I,)", required=False)
    npy(parser, "--text-ids", "integers (T,)", required=False)
    parser.add_argument(
        "--folds",
        type=positive(int),
        default=1,
        metavar="N",
        help="mean of N runs of images; 5 is COCO's 1K protocol (1)",
    )

    parser = add("reid", _reid, "mAP, mINP, CMC in Market-1501's protocol", REID, (1, 5, 10))
    npy(parser, "queries", "query features, .npy (Q, D): the metric's left side")
    npy(parser, "gallery", "gallery features, .npy (N, D)")
    for side, rows in (("query", "(Q,)"), ("gallery", "(N,)")):
        npy(parser, f"--{side}-ids", f"identities, integers {rows}")
        npy(parser, f"--{side}-cams", f"cameras, integers {rows}")

    parser = add("retrieval", _retrieval, "Recall@K, MAP@R, R-precision within one set", RETRIEVAL, (1, 2, 4, 8))
    npy(parser, "embeddings", "features, .npy (N, D)")
    npy(parser, "--labels", "classes, integers (N,)")

    for parser in protocols.choices.values():
        add_metric(parser)
        add_output(parser)
