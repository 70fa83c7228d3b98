"""Patches straight to rows that a decoder reads, without an encoder between (EVEv2, arXiv 2502.06788).

Dims: N patches, M patches a merge block, E inner width, D width, R rows.
"""

import torch
from torch import nn

from .linear import Linear

__all__ = ["PatchRows"]


class PatchRows(nn.Module):
    """Two convolutions whose kernels are their strides, GELU between, and two learned rows.

    pixel_values [N, patch_dim], the patches of a merge block together; image_rows int64 [R] says what each row of the
    result is: 0 `class_embedding`, 1 `split_embedding`, 2 + n the n-th merge block. -> image_features float32 [R, D].
    """

    def __init__(self, patch_dim: int, inner: int, block: int, width: int) -> None:
        super().__init__()
        self.block, self.inner = block, inner
        self.patches = Linear(patch_dim, inner, bias=True)
        self.blocks = Linear(block * inner, width, bias=True)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.split_embedding = nn.Parameter(torch.empty(width))

    def forward(self, pixel_values: torch.Tensor, image_rows: torch.Tensor) -> torch.Tensor:
        x_NE = nn.functional.gelu(self.patches(pixel_values.to(self.class_embedding.dtype)))
        # A kernel's axes are channel, y, x; so are a block's values.
        by_channel = x_NE.reshape(-1, self.block, self.inner).transpose(1, 2).reshape(-1, self.inner * self.block)
        rows = torch.cat((self.class_embedding[None], self.split_embedding[None], self.blocks(by_channel)))
        return rows.index_select(0, image_rows).to(torch.float32)
