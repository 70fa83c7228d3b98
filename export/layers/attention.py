"""The attentions of a vision-language model: packed segments without a cache, and causal with one.

Dims: N packed queries, M packed keys, B batch, S new tokens, P cached, T total, H query heads, G key/value heads, E
head size.
"""

from itertools import pairwise

import torch

from .semantic import emit, emit_many, is_tracing

__all__ = ["cached_attention", "last_positions", "segment_attention", "segment_cross_attention"]


def segment_attention(
    q_ND: torch.Tensor,
    k_ND: torch.Tensor,
    v_ND: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Bidirectional attention inside each segment, [N, H*E]; softmax in float32, `scale` 1/sqrt(E) where not given.

    `cu_seqlens` int32 [num_segments + 1]: segment i is rows cu_seqlens[i] to cu_seqlens[i+1]. Images of any sizes are
    packed into one call this way, without padding (NaViT, arXiv 2307.06304).
    """
    if is_tracing():
        attributes = {"num_heads": num_heads, "scale": _scale(q_ND, num_heads, scale)}
        inputs = [q_ND, k_ND, v_ND, cu_seqlens]
        return emit("SegmentAttention", inputs, shape=q_ND.shape, dtype=q_ND.dtype, attributes=attributes)
    return segment_cross_attention(q_ND, k_ND, v_ND, cu_seqlens, cu_seqlens, num_heads, scale=scale)


def segment_cross_attention(
    q_ND: torch.Tensor,
    k_MD: torch.Tensor,
    v_MD: torch.Tensor,
    cu_queries: torch.Tensor,
    cu_keys: torch.Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """The same where queries are not the keys' own tokens, as in pooling and resampling: [N, H*E].

    `cu_queries` and `cu_keys` int32 [num_segments + 1]: the queries of segment i see the keys of segment i and no
    others. Segments may have any lengths of at least 1.
    """
    if is_tracing():
        attributes = {"num_heads": num_heads, "scale": _scale(q_ND, num_heads, scale)}
        inputs = [q_ND, k_MD, v_MD, cu_queries, cu_keys]
        return emit("SegmentCrossAttention", inputs, shape=q_ND.shape, dtype=q_ND.dtype, attributes=attributes)
    rows = []
    for queries, keys in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        q, k, v = (
            x[slice(*bounds)].unflatten(-1, (num_heads, -1)).transpose(0, 1)
            for x, bounds in ((q_ND, queries), (k_MD, keys), (v_MD, keys))
        )
        scores = q.float() @ k.float().transpose(-1, -2) * _scale(q_ND, num_heads, scale)
        rows.append((scores.softmax(-1).to(v.dtype) @ v).transpose(0, 1).flatten(-2))
    return torch.cat(rows)


def _scale(q: torch.Tensor, num_heads: int, scale: float | None) -> float:
    return (q.shape[-1] // num_heads) ** -0.5 if scale is None else scale


def cached_attention(
    q_BSD: torch.Tensor,
    k_BSD: torch.Tensor,
    v_BSD: torch.Tensor,
    past_key_BGPE: torch.Tensor,
    past_value_BGPE: torch.Tensor,
    attention_mask_BT: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention that appends to a cache. Returns (out [B, S, H*E], key, value [B, G, T, E]).

    `attention_mask_BT` int64 counts the real tokens of each row (right padded); T = P + S unless the cache is a
    shared buffer of fixed length, which only the lowered graph can use.
    """
    head_size = past_key_BGPE.shape[-1]
    if is_tracing():
        batch, total = attention_mask_BT.shape
        cache_shape = [batch, num_kv_heads, total, head_size]
        attributes = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "scale": head_size**-0.5}
        out, key, value = emit_many(
            "CachedAttention",
            [q_BSD, k_BSD, v_BSD, past_key_BGPE, past_value_BGPE, attention_mask_BT],
            shapes=[q_BSD.shape, cache_shape, cache_shape],
            dtypes=[q_BSD.dtype, past_key_BGPE.dtype, past_value_BGPE.dtype],
            attributes=attributes,
        )
        return out, key, value
    q = q_BSD.unflatten(-1, (num_heads, head_size)).transpose(1, 2)
    k, v = (x.unflatten(-1, (num_kv_heads, head_size)).transpose(1, 2) for x in (k_BSD, v_BSD))
    key, value = torch.cat((past_key_BGPE, k), 2), torch.cat((past_value_BGPE, v), 2)
    num_new, total = q.shape[2], key.shape[2]
    causal = torch.ones(num_new, total, dtype=torch.bool).tril(total - num_new)
    visible = causal & attention_mask_BT[:, None, None, :total].bool()
    groups = num_heads // num_kv_heads
    k_all, v_all = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (q.float() @ k_all.float().transpose(-1, -2)) * head_size**-0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    weights = torch.nan_to_num(weights).to(v_all.dtype)  # rows of pure padding have nothing to attend to
    return (weights @ v_all).transpose(1, 2).flatten(-2), key, value


def last_positions(x_BSD: torch.Tensor, num_logits_to_keep: torch.Tensor) -> torch.Tensor:
    """The last n positions of x, n int64 [1]; 0 keeps all (the convention of transformers' logits_to_keep)."""
    if is_tracing():
        return emit("LastPositions", [x_BSD, num_logits_to_keep], shape=x_BSD.shape, dtype=x_BSD.dtype)
    return x_BSD[:, -int(num_logits_to_keep) :]
