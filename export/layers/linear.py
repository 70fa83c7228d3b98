"""Linear maps and embedding tables: the two kinds of weight that recipes quantize.

Dims: N outputs, K inputs, V vocabulary, D width; `...` any leading dims.
"""

import torch
from torch import nn

from .semantic import emit, is_tracing

__all__ = ["Embedding", "Linear", "TokenEmbedding"]


class Linear(nn.Module):
    """x [..., K] -> x @ weight.T (+ bias) [..., N]; weight [N, K] as checkpoints store it."""

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_tracing():
            return nn.functional.linear(x, self.weight, self.bias)
        y = emit("Linear", [x, self.weight], shape=[*x.shape[:-1], self.weight.shape[0]], dtype=x.dtype)
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """ids int64 [...] -> rows of weight [V, D], [..., D]."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if not is_tracing():
            return nn.functional.embedding(ids, self.weight)
        shape = [*ids.shape, self.weight.shape[1]]
        return emit("Embedding", [self.weight, ids], shape=shape, dtype=self.weight.dtype)


class TokenEmbedding(nn.Module):
    """input_ids int64 [B, S] -> inputs_embeds float32 [B, S, D]."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids).to(torch.float32)
