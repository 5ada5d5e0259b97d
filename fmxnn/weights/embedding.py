"""torch.nn.Embedding, its table being one layer of a weight."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from fmxnn.core.sizes import whole
from fmxnn.weights.linear import MakeFactorized, draw, fitted
from fmxnn.weights.weight import Weight


class FactorizedEmbedding(nn.Module):
    """`... -> ... embedding_dim`: nn.Embedding, its table being one layer of a weight.

    `num_embeddings` is the weight's latents and `embedding_dim` its d_model. A FactorizedLinear over the same weight
    is the output layer that shares the table.

    - `stack`: the weight, of any class; its layers are the tables.
    - `layer`: which of them is looked up.
    - `padding_idx`: a token whose embedding is zero and gets no gradient.

    `from_embedding` and `from_embeddings` fit a weight to modules that are there. `weight` is the table itself,
    multiplied out when it is asked for. Raises IndexError for a layer that the weight does not have.

    ```python
    stack = fx.CPWeight(1, 8, 100, rank=5)  # layers, embedding_dim, num_embeddings
    embed = fx.FactorizedEmbedding(stack, padding_idx=0)
    x = embed(torch.tensor([[3, 14, 15, 0]]))  # 1 4 8
    ```
    """

    def __init__(self, stack: Weight, layer: int = 0, *, padding_idx: int | None = None):
        super().__init__()
        self.stack, self.layer = stack, stack.at(layer).layer
        self.num_embeddings, self.embedding_dim = stack.latents, stack.d_model
        self.padding_idx = padding_idx if padding_idx is None else self._row(padding_idx)

    @property
    def weight(self) -> Tensor:
        """`-> num_embeddings embedding_dim`: the table, as nn.Embedding holds it; gradients reach the factors."""
        table = self.stack.at(self.layer).to_dense().T
        if self.padding_idx is None:
            return table
        return self._padded(torch.arange(self.num_embeddings, device=table.device), table)

    @override
    def extra_repr(self) -> str:
        """The sizes, and the place in the weight."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, layer={self.layer} of {self.stack.layers}"

    def reset_parameters(self) -> None:
        """Draws all layers of the weight as nn.Embedding is drawn: variance 1. A fresh weight has nn.Linear's."""
        draw(self.stack, 1.0)

    def forward(self, index: Tensor) -> Tensor:
        """`... -> ... embedding_dim`. Raises IndexError for a token outside."""
        return self._padded(index, self.stack.at(self.layer).rows(index))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, make: MakeFactorized, *, sweeps: int = 30, tries: int = 1) -> Self:
        """A module in place of `embedding`: `make(1, embedding_dim, num_embeddings)`, fitted to it by `fit_weight`.

        Raises as `from_embeddings` does.
        """
        return cls.from_embeddings([embedding], make, sweeps=sweeps, tries=tries)[0]

    @classmethod
    def from_embeddings(
        cls, embeddings: Sequence[nn.Embedding], make: MakeFactorized, *, sweeps: int = 30, tries: int = 1
    ) -> list[Self]:
        """A module for each of `embeddings`, over one weight: `make(layers, embedding_dim, num_embeddings)`, fitted.

        `fit_weight` takes `sweeps` and `tries`. Raises TypeError for other modules, ShapeError for embeddings of
        different sizes, ValueError for one that does more than a lookup.
        """
        embeddings = list(embeddings)
        for embedding in embeddings:
            _check_plain(embedding)
        tables = [embedding.weight for embedding in embeddings]
        stack = fitted(tables, make, "from_embeddings", sweeps=sweeps, tries=tries)
        return [
            cls(stack, layer, padding_idx=embedding.padding_idx).train(embedding.training)
            for layer, embedding in enumerate(embeddings)
        ]

    def _padded(self, index: Tensor, rows: Tensor) -> Tensor:
        return rows if self.padding_idx is None else torch.where((index == self.padding_idx).unsqueeze(-1), 0.0, rows)

    def _row(self, padding_idx: int) -> int:
        number = whole(padding_idx)
        if number is None or not -self.num_embeddings <= number < self.num_embeddings:
            raise ValueError(
                f"FactorizedEmbedding needs a padding_idx within num_embeddings={self.num_embeddings}, "
                f"got {padding_idx!r:.200}"
            )
        return number % self.num_embeddings


def _check_plain(embedding: nn.Embedding) -> None:
    if not isinstance(embedding, nn.Embedding):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"from_embeddings takes torch.nn.Embedding modules, got {type(embedding).__name__}")
    more = [name for name in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(embedding, name)]
    if more:
        raise ValueError(
            f"a FactorizedEmbedding looks up rows and nothing else, got an nn.Embedding with {', '.join(more)}; "
            "make one without"
        )
    at = embedding.padding_idx
    if at is not None and embedding.weight[at].any():
        raise ValueError(
            f"the embedding of padding_idx={at} is zero in a FactorizedEmbedding, got one that is not; "
            "zero that row, or set padding_idx to None"
        )
