"""Every argument of the integrations, with every wrong kind of value, as tests/test_bad_input.py has the package's own.

Nothing here hides what the libraries themselves say of their own arguments: those are not in the tables.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss
from support.good_calls import METRIC, NORMALIZE, TERMS, B, Call, D, M, N, metric, pair
from support.reference import features
from support.wrong_values import KINDS, faults_of
from transformers import BertConfig, BertModel

from gssf_triton.integrations import (
    arrays,
    faiss,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    sentence_transformers_model,
    timm,
)
from gssf_triton.integrations import transformers as hugging_face
from gssf_triton.nn import GSSF

SIZES = {"dim": "size", "block_size": "divisor", **TERMS}
EMBEDDINGS = {"a": "embeddings", "b": "embeddings"}


def similarity(device: str = "cpu") -> sentence_transformers.GSSFSimilarity:
    return sentence_transformers.GSSFSimilarity(D, B)


def knn(device: str) -> pytorch_metric_learning.GSSFKNN:
    return pytorch_metric_learning.GSSFKNN(pytorch_metric_learning.GSSFDistance(D, B))


def bert(device: str) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return {"model": BertModel(BertConfig(vocab_size=20, **sizes))}


CALLS: dict[str, Call] = {
    "arrays.folded_queries": Call(
        arrays.folded_queries,
        lambda device: {"queries": features(M, D), **metric("cpu")},
        {"queries": "features, one matrix or array", **METRIC, **NORMALIZE},
    ),
    "arrays.gallery_rows": Call(
        arrays.gallery_rows,
        lambda device: {"gallery": features(N, D)},
        {"gallery": "features, one matrix or array", **NORMALIZE},
    ),
    "arrays.save_arrays": Call(
        arrays.save_arrays,
        lambda device: {"path": Path("no/such/folder/a.npz"), **metric("cpu"), "queries": features(M, D),
                        "gallery": features(N, D)},
        {"path": "path", "W_diag": "W_diag, alone", "W_blocks": "W_blocks, alone",
         "queries": "features, array or None", "gallery": "features, array or None", **NORMALIZE},
    ),
    "arrays.load_arrays": Call(arrays.load_arrays, lambda device: {}, {"path": "path"}),
    "faiss.build_index": Call(
        faiss.build_index,
        lambda device: {"gallery": features(N, D)},
        {"gallery": "features, one matrix or array", "factory": "text", **NORMALIZE},
    ),
    "faiss.search": Call(
        faiss.search,
        lambda device: {"index": faiss.build_index(features(N, D)), "queries": features(M, D), **metric("cpu"), "k": 2},
        {"index": "index", "queries": "features, one matrix or array", **METRIC, "k": "size", **NORMALIZE},
    ),
    "open_clip.GSSFLoss": Call(
        open_clip.GSSFLoss,
        lambda device: {"loss": ClipLoss(), "metric": GSSF(D, B)},
        {"loss": "module", "metric": "metric"},
    ),
    "open_clip.GSSFLoss.forward": Call(
        open_clip.GSSFLoss.forward,
        lambda device: pair("cpu", M, ("image_features", "text_features")) | {"logit_scale": torch.tensor(1.0)},
        {"image_features": "features, rows", "text_features": "features, rows"},
        lambda device: open_clip.GSSFLoss(ClipLoss(), GSSF(D, B)),
    ),
    "pytorch_metric_learning.GSSFDistance": Call(
        pytorch_metric_learning.GSSFDistance, lambda device: {"dim": D, "block_size": B}, {**SIZES, "symmetric": "flag"}
    ),
    "pytorch_metric_learning.GSSFKNN": Call(
        pytorch_metric_learning.GSSFKNN, lambda device: {}, {"distance": "distance"}
    ),
    "pytorch_metric_learning.GSSFKNN.__call__": Call(
        pytorch_metric_learning.GSSFKNN.__call__,
        lambda device: {"query": features(M, D), "k": 2, "reference": features(N, D)},
        {"query": "query of references", "k": "count", "reference": "reference", "ref_includes_query": "flag"},
        knn,
    ),
    "sentence_transformers.GSSFSimilarity": Call(
        sentence_transformers.GSSFSimilarity, lambda device: {"dim": D, "block_size": B}, {**SIZES, **NORMALIZE}
    ),
    "sentence_transformers.GSSFSimilarity.forward": Call(
        sentence_transformers.GSSFSimilarity.forward, lambda device: pair("cpu"), EMBEDDINGS, similarity
    ),
    "sentence_transformers.GSSFSimilarity.pairwise": Call(
        sentence_transformers.GSSFSimilarity.pairwise, lambda device: pair("cpu"), EMBEDDINGS,
        lambda device: similarity().pairwise,
    ),
    "sentence_transformers.PairwiseSimilarity": Call(
        sentence_transformers.PairwiseSimilarity, lambda device: {}, {"similarity": "similarity"}
    ),
    "sentence_transformers.FusedRankingLoss": Call(
        sentence_transformers.FusedRankingLoss,
        lambda device: {"model": torch.nn.Linear(2, 2), "similarity": similarity()},
        {"model": "module", "similarity": "similarity", "scale": "positive number", "symmetric": "flag"},
    ),
    "sentence_transformers_model.QueryMetric": Call(
        sentence_transformers_model.QueryMetric, lambda device: {"dim": D, "block_size": B}, {**SIZES, **NORMALIZE}
    ),
    "timm.GSSFAttention": Call(
        timm.GSSFAttention,
        lambda device: {"dim": 2 * D, "num_heads": 2},
        {"dim": "size", "num_heads": "size", "block_size": "divisor of a head or None", **TERMS},
    ),
    "transformers.add_metric": Call(
        hugging_face.add_metric,
        bert,
        {"model": "model", "example_inputs": "inputs", "block_size": "divisor of a head or None", **TERMS},
    ),
    "transformers.from_pretrained": Call(
        hugging_face.from_pretrained,
        lambda device: {"model_class": BertModel, "folder": "no/such/folder"},
        {"model_class": "model class", "folder": "path"},
    ),
}  # fmt: skip

#: What is handed through to the library.
THEIRS = {"args", "kwargs", "logit_scale", "device", "dtype"}


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, parameter) for name, call in CALLS.items() for parameter in call.kinds]
)
def test_every_wrong_value_of_every_argument(name: str, parameter: str) -> None:
    call = CALLS[name]
    kind = call.kinds[parameter]
    faults = faults_of(call.callable("cpu"), call.arguments("cpu"), parameter, kind, may_run=True)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", CALLS)
def test_every_parameter_has_a_kind(name: str) -> None:
    call = CALLS[name]
    assert set(call.kinds) == set(inspect.signature(call.function).parameters) - {"self"} - THEIRS
    assert all(KINDS[kind] for kind in call.kinds.values())


def test_everything_public_is_called() -> None:
    modules = (
        arrays, faiss, open_clip, pytorch_metric_learning, sentence_transformers, sentence_transformers_model, timm,
        hugging_face,
    )  # fmt: skip
    public = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, thing in vars(module).items()
        if getattr(thing, "__module__", None) == module.__name__ and not name.startswith("_")
    }
    # What the libraries call, never a user.
    assert public - {"timm.NormThenMetric", "transformers.gssf_attention"} <= set(CALLS)
