"""GSSF as a module of a `SentenceTransformer`: the library trains, wraps, averages and saves it with the model."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.modules import Module
from torch import Tensor, nn

from gssf_triton.nn import GSSF
from gssf_triton.tracing import Leaf

#: The library's names of the two sides.
TASKS = ("query", "document")


class QueryMetric(Leaf, Module):
    """The last module of a model: it folds the metric into queries, so that dot products are GSSF similarities.

    Queries become T(q), documents are only normalised: what `encode_query` and `encode_document` return goes into any
    vector database of inner products. The library's task says which is which: `router_mapping` sets it in training (it
    is an error to leave it out), and plain `encode` takes every text as a document.

    The metric is part of what the Trainer wraps: with several processes it is averaged as the model is, and a cached
    loss divides its gradient by the steps of accumulation. Give losses `similarity_fct=util.dot_score`. To load the
    saved model pass `trust_remote_code=True`, as for every module that is not the library's own.

    Args:
        dim: Channels D of the embeddings.
        block_size: As `gssf_triton.nn.GSSF`, and so are the others.
        diag: Learn the diagonal term.
        blocks: Learn the block term.
        normalize: Put the embeddings on the unit sphere first.

    Attributes:
        metric: The `gssf_triton.nn.GSSF`.

    Source:
        Diao et al., GSSF, IEEE TIP 2024 (arXiv 2410.15266).

    Example:
        >>> import torch
        >>> from gssf_triton.integrations.sentence_transformers_model import QueryMetric
        >>> module = QueryMetric(dim=64)
        >>> # model = SentenceTransformer(name, similarity_fn_name="dot")
        >>> # model.append(module)
        >>> # args = SentenceTransformerTrainingArguments(…, router_mapping={"anchor": "query", "positive": "document"})
        >>> # loss = MultipleNegativesRankingLoss(model, similarity_fct=util.dot_score)
        >>> module({"sentence_embedding": torch.randn(3, 64)}, task="query")["sentence_embedding"].shape
        torch.Size([3, 64])
    """

    config_keys: list[str] = ["dim", "block_size", "diag", "blocks", "normalize"]  # noqa: RUF012 (the library's form)
    forward_kwargs: set[str] = {"task"}  # noqa: RUF012

    def __init__(
        self, dim: int, block_size: int = 32, diag: bool = True, blocks: bool = True, normalize: bool = True
    ) -> None:
        super().__init__()
        self.metric = GSSF(dim, block_size, diag, blocks, normalize)
        self.dim, self.block_size, self.diag, self.blocks, self.normalize = dim, block_size, diag, blocks, normalize

    def forward(self, features: dict[str, Any], task: str | None = None, **_: Any) -> dict[str, Any]:
        """`features` with T(q) or normalised documents as embeddings, by the task."""
        task = features.get("task") if task is None else task
        if task not in TASKS and (task is not None or self.training):
            raise ValueError(
                f"the task must be 'query' or 'document', got {task!r}: in training give the arguments a "
                "router_mapping from columns to tasks, elsewhere call encode_query and encode_document"
            )
        embeddings: Tensor = features["sentence_embedding"]
        if task == "query":
            features["sentence_embedding"] = self.metric.transform(embeddings)
        else:
            if self.normalize:
                embeddings = nn.functional.normalize(embeddings, dim=-1)
            # DistributedDataParallel waits for the gradient of every parameter, so every pass must use them all. The
            # sum of no values is 0.
            nothing = sum(weight.flatten()[:0].sum() for weight in self.parameters())
            features["sentence_embedding"] = embeddings + nothing
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write configuration and weights to a folder."""
        module: Any = self
        module.save_config(output_path)
        module.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> QueryMetric:
        """Load from a folder or the hub; called by the library."""
        hub = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)
        return module
