"""What takes the place of nn.Linear and nn.Embedding in a model whose matrices are packed."""

from __future__ import annotations

from torch import Tensor, nn

from shortstack.runtimes.packed.matrix import Matrix


class PackedLinear(nn.Module):
    """y = x W^T + b with W in some form."""

    def __init__(self, matrix: Matrix, bias: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        made = self.matrix.multiply(x)
        return made if self.bias is None else made.add_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} to {self.out_features}, {self.matrix.form}"


class PackedEmbedding(nn.Module):
    """Rows of a matrix in some form. `scale`: what Gemma's embedding multiplies by."""

    scale: Tensor | None

    def __init__(self, matrix: Matrix, scale: Tensor | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.rows, matrix.columns
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        made = self.matrix.gather(ids.reshape(-1)).view(*ids.shape, -1)
        return made if self.scale is None else made * self.scale.to(made.dtype)
