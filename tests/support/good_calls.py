"""One call that works of every public function, module and reader, and the kind of each of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import gssf_triton
from gssf_triton import data, metrics, nn, viz
from gssf_triton.attention.heads import HeadMetric
from support.reference import features, weights

#: 4 rows, 6 gallery items, D = 24 = 3 blocks of 8.
M, N, D, G, B = 4, 6, 24, 3, 8


@dataclass(frozen=True)
class Call:
    """A call that works.

    Attributes:
        function: What is called, or makes what is called: see `bound`.
        arguments: device → good arguments by name; every parameter that a table's wrong value is made of.
        kinds: Parameter → its kind, a key of `wrong_values.KINDS`.
        bound: device → the callable itself, where it is a method of something that must be made first.
    """

    function: Callable[..., Any]
    arguments: Callable[[str], dict[str, Any]]
    kinds: dict[str, str]
    bound: Callable[[str], Callable[..., Any]] | None = None

    def callable(self, device: str) -> Callable[..., Any]:
        return self.bound(device) if self.bound else self.function


def metric(device: str) -> dict[str, Any]:
    return dict(weights("diag+blocks", G, B, device=device))


def pair(device: str, rows: int = M, names: tuple[str, str] = ("a", "b")) -> dict[str, Any]:
    return dict(zip(names, (features(M, D, device=device), features(rows, D, device=device)), strict=True))


def ids(device: str, **counts: int) -> dict[str, Any]:
    return {name: torch.arange(count, device=device) for name, count in counts.items()}


METRIC = {"W_diag": "W_diag", "W_blocks": "W_blocks"}
NORMALIZE = {"normalize": "flag"}
BACKEND = {"backend": "choice"}
NUMERICS = {**NORMALIZE, "out_dtype": "dtype", **BACKEND}
LOSS = {"a": "features, paired matrix", "b": "features, paired matrix", **METRIC, **NORMALIZE, "reduction": "choice",
        "group": "group", **BACKEND}  # fmt: skip
SEARCH = {"queries": "features, matrix", "gallery": "features, tensor or array", **METRIC, **NORMALIZE,
          "exclude": "labels or None", "mask": "mask of pairs", "group": "group", "progress": "flag",
          **BACKEND}  # fmt: skip
MEASURED = {**METRIC, "ks": "cut-offs", **NORMALIZE, "progress": "flag", **BACKEND}
REGIONS = {"regions": "features, items", "words": "features, items", **METRIC, "region_mask": "mask of rows",
           "word_mask": "mask of rows", **NUMERICS}  # fmt: skip
TERMS = {"diag": "flag", "blocks": "flag"}
PLACE = {"device": "device", "dtype": "dtype"}
MODULE = {"metric": "metric", "reduction": "choice", "group": "group", **BACKEND}


def search_call(device: str) -> dict[str, Any]:
    return {
        **pair(device, N, ("queries", "gallery")),
        **metric(device),
        "exclude": torch.tensor([0, 5, -1, 2], device=device),
        "mask": torch.ones(M, N, dtype=torch.bool, device=device),
    }


def region_call(device: str) -> dict[str, Any]:
    return {
        "regions": features(2, 3, D, device=device),
        "words": features(2, 5, D, device=device),
        **metric(device),
        "region_mask": torch.ones(2, 3, dtype=torch.bool, device=device),
        "word_mask": torch.ones(2, 5, dtype=torch.bool, device=device),
    }


def attention_call(device: str) -> dict[str, Any]:
    return {
        "q": features(2, 3, 4, D, device=device),
        "k": features(2, 3, 5, D, device=device),
        "v": features(2, 3, 5, 7, device=device),
        "W_diag": torch.ones(3, D, device=device),
        "W_blocks": torch.ones(3, G, B, B, device=device),
    }


def masked_attention_call(device: str) -> dict[str, Any]:
    return attention_call(device) | {"attn_mask": torch.ones(4, 5, dtype=torch.bool, device=device)}


def distillation_call(device: str) -> dict[str, Any]:
    teachers = {f"teacher_{name}": x for name, x in (pair(device, N) | metric(device)).items()}
    return {**pair(device, N), **metric(device), **teachers, "logit_scale": 5.0}


def with_loss(**options: Any) -> Callable[[str], dict[str, Any]]:
    return lambda device: {**pair(device), **metric(device), **options}


FUNCTIONS: dict[str, Call] = {
    "pairwise_sim": Call(
        gssf_triton.pairwise_sim,
        lambda device: {**pair(device, N), **metric(device)},
        {"a": "features, rows", "b": "features, rows", **METRIC, **NUMERICS},
    ),
    "pairwise_sim, batched": Call(
        gssf_triton.pairwise_sim,
        lambda device: {"a": features(3, M, D, device=device), "b": features(3, N, D, device=device), **metric(device)},
        {"a": "features, rows, batch", "b": "features, rows, batch", **METRIC, **NUMERICS},
    ),
    "pairwise_terms": Call(
        gssf_triton.pairwise_terms,
        lambda device: {**pair(device, N), **metric(device)},
        {"a": "features, rows", "b": "features, rows", "W_diag": "W_diag, wanted", "W_blocks": "W_blocks, wanted",
         **NUMERICS},
    ),
    "paired_sim": Call(
        gssf_triton.paired_sim,
        lambda device: {"a": features(3, M, D, device=device), "b": features(3, M, D, device=device), **metric(device)},
        {"a": "features, paired", "b": "features, paired", **METRIC, **NUMERICS},
    ),
    "transform": Call(
        gssf_triton.transform,
        lambda device: {"x": features(M, D, device=device), **metric(device)},
        {"x": "features", **METRIC, "side": "choice", **NORMALIZE, **BACKEND},
    ),
    "dense_metric": Call(gssf_triton.dense_metric, metric, METRIC),
    "info_nce": Call(
        gssf_triton.info_nce,
        lambda device: with_loss(logit_scale=5.0)(device) | ids(device, ids=M),
        {**LOSS, "logit_scale": "number or tensor", "ids": "labels or None", "symmetric": "flag",
         "label_smoothing": "fraction", "memory": "choice"},
    ),
    "sigmoid_loss": Call(
        gssf_triton.sigmoid_loss,
        lambda device: with_loss(logit_scale=5.0, logit_bias=-5.0)(device) | ids(device, ids=M),
        {**LOSS, "logit_scale": "number or tensor", "logit_bias": "number or tensor", "ids": "labels or None"},
    ),
    "triplet_loss": Call(
        gssf_triton.triplet_loss,
        lambda device: with_loss()(device) | ids(device, ids=M),
        {**LOSS, "margin": "number", "hardest": "flag", "ids": "labels or None", "return_violations": "flag"},
    ),
    "distillation_loss": Call(
        gssf_triton.distillation_loss,
        distillation_call,
        {**LOSS, "teacher_a": "features, paired matrix", "teacher_b": "features, paired matrix",
         "teacher_W_diag": "W_diag", "teacher_W_blocks": "W_blocks", "logit_scale": "number or tensor"},
    ),
    "topk": Call(gssf_triton.topk, lambda device: search_call(device) | {"k": 3}, {**SEARCH, "k": "count within k"}),
    "ranks": Call(
        gssf_triton.ranks,
        lambda device: search_call(device) | ids(device, query_ids=M, gallery_ids=N, query_cams=M, gallery_cams=N),
        {**SEARCH, "query_ids": "labels", "gallery_ids": "labels", "query_cams": "labels or None",
         "gallery_cams": "labels or None"},
    ),
    "late_interaction": Call(
        gssf_triton.late_interaction, region_call, {**REGIONS, "pooling": "choice", "sharpness": "positive number"}
    ),
    "cross_attention_sim": Call(
        gssf_triton.cross_attention_sim, region_call, {**REGIONS, "smooth": "positive number"}
    ),
    "attention": Call(
        gssf_triton.attention,
        masked_attention_call,
        {"q": "features, rows", "k": "features, attended rows", "v": "features, values", "W_diag": "W_diag, heads",
         "W_blocks": "W_blocks, heads", "attn_mask": "mask of scores", "is_causal": "flag", "scale": "number or None",
         "dropout_p": "probability", **BACKEND},
    ),
    "metrics.image_text": Call(
        metrics.image_text,
        lambda device: pair(device, N, ("images", "texts")) | metric(device) | ids(device, image_ids=M, text_ids=N),
        {"images": "features, matrix", "texts": "features, matrix", "image_ids": "labels", "text_ids": "labels",
         "folds": "count within", **MEASURED},
    ),
    "metrics.reid": Call(
        metrics.reid,
        lambda device: pair(device, N, ("queries", "gallery")) | metric(device)
        | ids(device, query_ids=M, gallery_ids=N, query_cams=M, gallery_cams=N),
        {"queries": "features, matrix", "gallery": "features, matrix", "query_ids": "labels", "gallery_ids": "labels",
         "query_cams": "labels", "gallery_cams": "labels", **MEASURED},
    ),
    "metrics.retrieval": Call(
        metrics.retrieval,
        lambda device: {"embeddings": features(M, D, device=device), **metric(device), **ids(device, labels=M)},
        {"embeddings": "features, one matrix", "labels": "labels", **MEASURED},
    ),
}  # fmt: skip


def gssf(device: str) -> nn.GSSF:
    return nn.GSSF(D, B, device=device)


def attention_inputs(device: str) -> dict[str, Any]:
    return {
        "query": features(2, 4, D, device=device),
        "key": features(2, 5, D, device=device),
        "value": features(2, 5, D, device=device),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.bool, device=device),
        "attn_mask": torch.zeros(4, 5, dtype=torch.bool, device=device),
    }


def loss_module(make: Callable[..., torch.nn.Module]) -> Callable[[str], Callable[..., Any]]:
    return lambda device: make(gssf(device)).to(device)


LABELLED = {"a": "features, paired matrix", "b": "features, paired matrix", "ids": "labels or None"}
SCALED = {**MODULE, "logit_scale": "positive number", "learn_scale": "flag",
          "max_logit_scale": "positive number or infinity"}  # fmt: skip

MODULES: dict[str, Call] = {
    "nn.GSSF": Call(
        nn.GSSF,
        lambda device: {"dim": D, "block_size": B},
        {"dim": "size", "block_size": "divisor", **TERMS, **NORMALIZE, **PLACE},
    ),
    "nn.GSSF.forward": Call(
        nn.GSSF.forward, lambda d: pair(d, N), {"a": "features, rows", "b": "features, rows"}, gssf
    ),
    "nn.GSSF.paired": Call(
        nn.GSSF.paired, pair, {"a": "features, paired rows", "b": "features, paired rows"}, lambda d: gssf(d).paired
    ),
    "nn.GSSF.transform": Call(
        nn.GSSF.transform,
        lambda device: {"x": features(M, D, device=device)},
        {"x": "features", "side": "choice"},
        lambda d: gssf(d).transform,
    ),
    "nn.InfoNCELoss": Call(
        nn.InfoNCELoss,
        lambda device: {"metric": gssf(device)},
        {**SCALED, "symmetric": "flag", "label_smoothing": "fraction", "memory": "choice"},
    ),
    "nn.InfoNCELoss.forward": Call(
        nn.InfoNCELoss.forward, lambda d: pair(d) | ids(d, ids=M), LABELLED, loss_module(nn.InfoNCELoss)
    ),
    "nn.SigmoidLoss": Call(
        nn.SigmoidLoss, lambda device: {"metric": gssf(device)}, {**SCALED, "logit_bias": "number"}
    ),
    "nn.SigmoidLoss.forward": Call(
        nn.SigmoidLoss.forward, lambda d: pair(d) | ids(d, ids=M), LABELLED, loss_module(nn.SigmoidLoss)
    ),
    "nn.TripletLoss": Call(
        nn.TripletLoss,
        lambda device: {"metric": gssf(device)},
        {**MODULE, "margin": "number", "hardest": "flag"},
    ),
    "nn.TripletLoss.forward": Call(
        nn.TripletLoss.forward, lambda d: pair(d) | ids(d, ids=M), LABELLED, loss_module(nn.TripletLoss)
    ),
    "nn.DistillationLoss": Call(
        nn.DistillationLoss,
        lambda device: {"metric": gssf(device), "teacher": gssf(device)},
        {**MODULE, "teacher": "metric or None", "logit_scale": "positive number"},
    ),
    "nn.DistillationLoss.forward": Call(
        nn.DistillationLoss.forward,
        lambda d: pair(d, N) | pair(d, N, ("teacher_a", "teacher_b")),
        dict.fromkeys(("a", "b", "teacher_a", "teacher_b"), "features, paired matrix"),
        loss_module(nn.DistillationLoss),
    ),
    "nn.GSSFAttention": Call(
        nn.GSSFAttention,
        lambda device: {"embed_dim": 2 * D, "num_heads": 2, "block_size": B},
        {"embed_dim": "size", "num_heads": "size", "dropout": "probability", "bias": "flag", "kdim": "size or None",
         "vdim": "size or None", "batch_first": "flag", "block_size": "divisor or None", **TERMS, **PLACE},
    ),
    "nn.GSSFAttention.forward": Call(
        nn.GSSFAttention.forward,
        attention_inputs,
        {"query": "features, tokens", "key": "features, tokens", "value": "features, tokens",
         "key_padding_mask": "mask of scores", "attn_mask": "mask of scores", "need_weights": "flag",
         "average_attn_weights": "flag", "is_causal": "flag"},
        lambda device: nn.GSSFAttention(D, 3, batch_first=True, device=device),
    ),
    "heads.HeadMetric": Call(
        HeadMetric,
        lambda device: {"num_heads": 3, "head_dim": D, "block_size": B},
        {"num_heads": "size", "head_dim": "size", "block_size": "divisor or None", **TERMS, **PLACE},
    ),
    "heads.HeadMetric.forward": Call(
        HeadMetric.forward,
        lambda device: {"q": features(2, 3, M, D, device=device)},
        {"q": "features, heads"},
        lambda device: HeadMetric(3, D, B, device=device),
    ),
}  # fmt: skip


def glyphs(device: str) -> data.Glyphs:
    import numpy as np

    images, each = np.zeros((6, 32, 32), np.uint8), np.arange(6)
    return data.Glyphs(images, each, each * 0, tuple("abcdef"), ("face",))


PARTS = {"a": "features, paired rows", "b": "features, paired rows", **METRIC, **NORMALIZE}
ROOT = {"root": "path"}

OTHERS: dict[str, Call] = {
    "viz.score_parts": Call(viz.score_parts, lambda device: {**pair(device), **metric(device)}, PARTS),
    "viz.relevance": Call(
        viz.relevance,
        lambda device: {**pair(device), **metric(device)},
        PARTS | {"a": "features, paired matrix", "b": "features, paired matrix"},
    ),
    "viz.similarity_histogram": Call(
        viz.similarity_histogram,
        lambda device: {**pair(device, N), **metric(device), **ids(device, a_ids=M, b_ids=N)},
        {"a": "features, matrix", "b": "features, matrix", **METRIC, "a_ids": "labels or None",
         "b_ids": "labels or None", "bins": "size", **NORMALIZE},
    ),
    "viz.plot_metric": Call(viz.plot_metric, metric, {**METRIC, "ax": "axes"}),
    "viz.plot_parts": Call(
        viz.plot_parts,
        lambda device: {"parts": viz.relevance(**pair(device), **metric(device))},
        {"parts": "score parts", "ax": "axes"},
    ),
    "viz.plot_similarities": Call(
        viz.plot_similarities,
        lambda device: {"histogram": viz.similarity_histogram(**pair(device), **metric(device))},
        {"histogram": "histogram", "ax": "axes"},
    ),
    "data.load_cub200": Call(data.load_cub200, lambda device: {}, ROOT),
    "data.load_sop": Call(data.load_sop, lambda device: {}, ROOT),
    "data.load_market1501": Call(data.load_market1501, lambda device: {}, ROOT),
    "data.load_precomputed": Call(
        data.load_precomputed,
        lambda device: {"root": "nowhere", "name": "f30k", "split": "dev"},
        {**ROOT, "name": "choice", "split": "choice"},
    ),
    "data.load_glyphs": Call(data.load_glyphs, lambda device: {}, {"progress": "flag"}),
    "data.Glyphs.split": Call(
        data.Glyphs.split,
        lambda device: {"held_out": 2, "seed": 0},
        {"held_out": "count within", "seed": "count"},
        lambda device: glyphs(device).split,
    ),
}  # fmt: skip
