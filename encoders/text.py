"""A sentence encoder as a module: from texts to embeddings, differentiable in its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from jaxtyping import Float
    from sentence_transformers import SentenceTransformer
    from torch import Tensor


class SentenceEncoder(nn.Module):
    """A sentence-transformers model with the pooling that it comes with, and normalization that is one's own choice.

    PPlug (arXiv 2409.11901) has two of them: one that is frozen, for histories, and one that is trained, for the input.

    Args:
        model: a `SentenceTransformer`, which is used as it is, and not copied.
        normalized: whether embeddings get norm 1. If not, they are left as pooling gives them, also where the model
            itself would normalize them.
    """

    def __init__(self, model: SentenceTransformer, *, normalized: bool = True) -> None:
        super().__init__()
        self.model, self.normalized = model, normalized

    @property
    def width(self) -> int:
        """Of the embeddings."""
        width = self.model.get_embedding_dimension()
        assert width is not None
        return width

    @property
    def layers(self) -> list[nn.Module]:
        """What texts pass through, without the model's own normalization."""
        from sentence_transformers.sentence_transformer.modules import Normalize

        return [layer for layer in self.model if not isinstance(layer, Normalize)]

    def tokenize(self, texts: Sequence[str], prefix: str = "") -> dict[str, Any]:
        """What `forward` takes for at least one text, on the model's device; `prefix` is put in front of each."""
        features = self.model.preprocess(list(texts), prompt=prefix or None)
        return {
            name: value.to(self.model.device) if torch.is_tensor(value) else value for name, value in features.items()
        }

    def forward(self, features: dict[str, Any]) -> Float[Tensor, "text d"]:
        """One embedding for each text."""
        # A copy, as the layers add to what they are given.
        features = dict(features)
        for layer in self.layers:
            features = layer(features)
        embeddings = features["sentence_embedding"][:, : self.model.truncate_dim]
        return normalize(embeddings, dim=-1) if self.normalized else embeddings

    def freeze_unused(self) -> None:
        """Asks for no gradient of weights that play no part in embeddings, such as those of BERT's own pooling.

        A trainer of several devices would wait for their gradients, and a checkpoint would hold them.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            embedding = self(self.tokenize(["a"]))
            gradients = torch.autograd.grad(embedding.sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
