"""Writes a checkpoint folder as Qwen2.5-VL is published: flat config, hub names, tokenizer and processor files."""

import json
from pathlib import Path

import torch
from inputs import MAX_PIXELS, MEAN, MERGE, MIN_PIXELS, PATCH, STD
from model import flat_config
from safetensors.torch import save_file
from tokenizer import NOT_SPECIAL, SPECIAL
from tokenizers import Tokenizer

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def hub_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """float16 tensors under their published names; the tied head is left out."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        half = tensor.detach().to(torch.float16).contiguous()
        assert bool(half.isfinite().all()), f"{name} does not fit float16"
        renamed[name] = half
    return renamed


def tokenizer_config(token_ids: dict[str, int]) -> dict:
    """`tokenizer_config.json` of Qwen2.5-VL with this vocabulary's ids."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    texts = (*SPECIAL, *NOT_SPECIAL)
    added = {str(token_ids[text]): {"content": text, **flags, "special": text in SPECIAL} for text in texts}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }


def save_checkpoint(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """Write every file of the checkpoint below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = tokenizer.get_vocab()
    stop = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    files = {
        "config.json": flat_config(ids),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": stop,
            "repetition_penalty": 1.0,
            "transformers_version": "4.49.0",
        },
        "preprocessor_config.json": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
        "tokenizer_config.json": tokenizer_config(ids),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(hub_names(model), folder / "model.safetensors", metadata={"format": "pt"})
