"""What make_llava_goldens.py makes: one Recipe a folder, with its configuration, processor and tokenizer."""

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is in the picture? ASSISTANT: Two red circles. How many?"
)
CORPUS = TEXT.split(" ")
# As published with llava-1.5-7b-hf: images of a message come first, then its texts.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA = " ".join(CORPUS[: CORPUS.index("USER:")])


@dataclass(frozen=True)
class Recipe:
    """One folder. `layout`: whose tensor names it has."""

    name: str
    about: str
    seed: int
    config: LlavaConfig
    processor: Any
    layout: str  # "v4", "v5" or "first"


def tokenizer(with_image: bool) -> Tokenizer:
    """Like Llama's: sentencepiece's spaces, bytes for what is unknown, <s> in front of every text."""
    built = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    every_byte = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *every_byte])
    built.train_from_iterator(CORPUS, trainer)
    state = json.loads(built.to_str())  # bytes are words of the vocabulary, but not special
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    built = Tokenizer.from_str(json.dumps(state))
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if with_image:
        built.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
        built.add_special_tokens([AddedToken("<pad>", special=True, normalized=False)])
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return built


def recipes() -> list[Recipe]:
    vision = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 448,
        "max_position_embeddings": 512,
    }
    image_id = tokenizer(with_image=True).token_to_id("<image>")
    clip = CLIPVisionConfig(**vision, patch_size=14, image_size=56)
    llama = LlamaConfig(**text, rms_norm_eps=1e-5)
    square = {"height": 56, "width": 56}
    return [
        Recipe(
            "tiny_a_clip",
            "CLIP, patches alone, one layer; Llama with as many key/value heads as queries; short side and crop",
            38,
            LlavaConfig(vision_config=clip, text_config=llama, image_token_index=image_id),
            CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square),
            "v4",
        ),
        Recipe(
            "tiny_b_full",
            "CLIP with its class token and two layers side by side; grouped heads, a tied head; padded to squares",
            31,
            LlavaConfig(
                vision_config=clip,
                text_config=LlamaConfig(**text, num_key_value_heads=2, tie_word_embeddings=True),
                image_token_index=image_id,
                vision_feature_layer=[-3, -1],
                vision_feature_select_strategy="full",
                tie_word_embeddings=True,
            ),
            LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 56}, crop_size=square),
            "v5",
        ),
        Recipe(
            "tiny_c_siglip",
            "SigLIP on 60 pixels, of which four whole patches are 56; Qwen2; images stretched",
            39,
            LlavaConfig(
                vision_config=SiglipVisionConfig(**vision, patch_size=14, image_size=60),
                text_config=Qwen2Config(**text, num_key_value_heads=2),
                image_token_index=image_id,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
            SiglipImageProcessorPil(size={"height": 60, "width": 60}),
            "v5",
        ),
        Recipe(
            "tiny_d_first_release",
            "The names, prompt and padding of the first release (llava_llama)",
            36,
            LlavaConfig(vision_config=clip, text_config=llama, image_token_index=447),
            LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": 56}, crop_size=square),
            "first",
        ),
    ]
