"""The demo's architecture: Qwen2.5-VL at 2.3 million parameters, with attentions that train fast on a CPU.

Dims: B segments, L longest segment, N patches of all images, H heads, D head size.
"""

import torch
from tokenizer import VOCAB_SIZE
from torch import nn
from torch.nn.functional import linear
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

# transformers hands cumulative lengths to an attention only if its name says flash; others are called once a segment.
PADDED_SEGMENTS = "flash_padded_segments"
PLAIN = "plain_attention"


def flat_config(token_ids: dict[str, int]) -> dict:
    """`config.json` in the layout published for Qwen2.5-VL: text keys at the top, a vision_config below."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_token_id": token_ids["<|vision_pad|>"],
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 2048,
        "max_window_layers": 5,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 5,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "transformers_version": "4.49.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
        "vision_config": {
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": 128,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
            "model_type": "qwen2_5_vl",
        },
    }


class StillPatchEmbed(nn.Module):
    """The patch embedding for still images: both halves of the temporal kernel see one frame, so add them."""

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, 3 * 14 * 14] normalised -> [N, C]."""
        return linear(patches, self.proj.weight.sum(2).flatten(1))


def build_model(token_ids: dict[str, int], seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh model with float32 weights; its vision tower takes one frame a patch and uses `padded_segments`."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(flat_config(token_ids))).float()
    AttentionInterface.register(PADDED_SEGMENTS, padded_segments)
    AttentionInterface.register(PLAIN, plain_attention)
    model.model.visual.patch_embed = StillPatchEmbed(model.model.visual.patch_embed.proj)
    model.model.visual.config._attn_implementation = PADDED_SEGMENTS
    model.model.language_model.config._attn_implementation = PLAIN
    return model


def plain_attention(module, query, key, value, attention_mask, scaling, **unused):
    """Attention as three operations: in bfloat16 on a CPU it takes half the time of PyTorch's fused kernel, both ways.

    query [B, H, T, D]; key, value [B, K, T, D] with K dividing H; attention_mask [B, 1, T or 1, T] is added;
    result [B, T, H, D] and None.
    """
    B, H, T, D = query.shape
    K = key.shape[1]
    scores = (query.reshape(B, K, H // K * T, D) * scaling @ key.mT).view(B, K, H // K, T, T)
    scores = scores + attention_mask[:, :, None]
    out = scores.softmax(-1).view(B, K, H // K * T, T) @ value
    return out.view(B, H, T, D).transpose(1, 2), None


def padded_segments(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **unused):
    """Bidirectional attention inside each segment, all segments at once: padded to the longest, the padding masked.

    query, key, value [1, H, N, D]; cu_seq_lens_q int [B + 1]; result [1, N, H, D], None.
    """
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff().long()
    within = torch.arange(int(lengths.max()))
    valid = within < lengths[:, None]  # [B, L]
    index = torch.where(valid, starts[:, None] + within, starts[:, None])
    q, k, v = (x[0].transpose(0, 1)[index].transpose(1, 2) for x in (query, key, value))  # [B, H, L, D]
    bias = torch.zeros(valid.shape, dtype=q.dtype).masked_fill_(~valid, -1e4)
    out, _ = plain_attention(module, q, k, v, bias[:, None, None, :], scaling)
    return out[valid][None], None
