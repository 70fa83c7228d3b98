"""Makes goldens/llava: tiny random checkpoints of LLaVA, and what transformers' own class computes from them.

    .venv/bin/python tests/make_llava_goldens.py [FOLDER]

The first release (llava_llama) has no class in transformers: its case is the same model under the names of that
release, its prompt and pixels by that release's own few lines (tokenizer_image_token, expand2square), written here.
"""

import json
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_recipes import TEMPLATE, VICUNA, Recipe, recipes, tokenizer
from PIL import Image
from safetensors.numpy import save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmport.validate.samples import draw_picture

STEPS = 16


def randomised(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """Weights that keep activations at unit scale."""
    config.text_config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).float().eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1 and ("norm" in name or "layrnorm" in name) and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * values)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * values)
            elif "embed" in name and "patch" not in name:
                parameter.copy_(0.3 * values if config.tie_word_embeddings else values)
            else:
                parameter.copy_(1.5 * values * parameter[0].numel() ** -0.5)
    return model


CASES: dict[str, list[dict[str, Any]]] = {
    "text_only": [{"role": "user", "content": ["What is in the picture?"]}],
    "image_wide": [{"role": "user", "content": [("wide_90x41.png", 1, 90, 41), "How many circles?"]}],
    "image_tall": [{"role": "user", "content": [("tall_37x71.png", 2, 37, 71), "What is it?"]}],
    "two_images_two_turns": [
        {"role": "user", "content": [("exact_56x56.png", 3, 56, 56), "What is in the picture?"]},
        {"role": "assistant", "content": ["Two red circles."]},
        {"role": "user", "content": [("small_20x25.png", 4, 20, 25), "And here?"]},
    ],
}


def main(root: Path) -> None:
    for recipe in recipes():
        make(recipe, root / recipe.name)


def make(recipe: Recipe, folder: Path) -> None:
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    model = randomised(recipe.config, recipe.seed)
    built = tokenizer(with_image=recipe.layout != "first")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    num_extra = 0 if recipe.config.vision_config.model_type.startswith("siglip") else 1
    processor: Any = None
    if recipe.layout != "first":
        processor = LlavaProcessor(
            recipe.processor,
            wrapped,
            patch_size=14,
            vision_feature_select_strategy=recipe.config.vision_feature_select_strategy,
            num_additional_image_tokens=num_extra,
            chat_template=TEMPLATE,
        )
    cases: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, turns in CASES.items():
        cases[name], found = run_case(recipe, model, wrapped, processor, folder, turns)
        tensors |= {f"{name}/{key}": value for key, value in found.items()}
        for stage in cases[name]["stages"]:
            stage["tensor"] = f"{name}/{stage['tensor']}"
    write_checkpoint(recipe, model, wrapped, folder)
    save_file(tensors, folder / "expected.safetensors")
    ids = {token: wrapped.convert_tokens_to_ids(token) for token in wrapped.all_special_tokens}
    write_json(
        folder / "expected.json",
        {
            "schema": "vlmport-golden/1",
            "family": "llava",
            "upstream": f"transformers {version('transformers')}, LlavaForConditionalGeneration",
            "seed": recipe.seed,
            "dtype": "float32",
            "attention": "eager",
            "versions": {name: version(name) for name in ("transformers", "torch", "tokenizers", "pillow")},
            "special_token_ids": ids,
            "batches": {},
            "upstream_fields": {},
            "cases": cases,
        },
    )
    (folder / "README.md").write_text(
        f"# LLaVA golden `{recipe.name}` (random weights)\n\n{recipe.about}.\n\nMade by tests/make_llava_goldens.py "
        f"with transformers {version('transformers')}; weights, tokenizer and images were made for this project.\n",
        encoding="utf-8",
    )


def run_case(
    recipe: Recipe, model: Any, wrapped: Any, processor: Any, folder: Path, turns: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The record of one case and its tensors."""
    messages, images = [], []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for part in turn["content"]:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            file, seed, width, height = part
            draw_picture(seed, width, height).save(folder / "inputs" / file)
            images.append(Image.open(folder / "inputs" / file).convert("RGB"))
            parts.append({"type": "image", "image": f"inputs/{file}"})
        messages.append({"role": turn["role"], "content": parts})
    pixels = np.stack(recipe.processor(images=images, return_tensors="np")["pixel_values"]) if images else None
    if recipe.layout == "first":
        asked, ids = first_release_ids(messages, wrapped)
    else:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor(text=text, images=images or None)["input_ids"][0]
        asked = ids
    found = compute(model, ids, pixels)
    record = {
        "request": {"messages": messages, "options": {}},
        "input_ids": asked,
        "generation": {"max_new_tokens": STEPS, "do_sample": False, "ignore_eos": True, "repetition_penalty": 1.0},
        "generated_ids": found["step_logits"].argmax(-1).tolist(),
        "min_margin": float(np.diff(np.sort(found["step_logits"])[:, -2:]).min()),
        "stages": [stage(name, array) for name, array in found.items()],
        "hashes": {},
        "upstream_fields": {},
    }
    for index, image in enumerate(() if pixels is None else pixels):
        side = image.shape[1] // 14 * 14
        image = np.ascontiguousarray(image[:, :side, :side])  # what a convolution reads
        record["hashes"][f"pixel_values.{index}"] = {
            "stage": "pixel_values",
            "index": index,
            "shape": list(image.shape),
            "sha256_f32": sha256(image.tobytes()).hexdigest(),
        }
    return record, found


def first_release_ids(messages: list[dict[str, Any]], wrapped: Any) -> tuple[list[int], list[int]]:
    """Ids with -200 once an image, and with 16 rows of the token 447 instead, which transformers overwrites."""
    text = VICUNA + " "
    for message in messages:
        content = "".join(part.get("text", "<image>\n") for part in message["content"])
        text += f"USER: {content} " if message["role"] == "user" else f"ASSISTANT: {content}</s>"
    text += "ASSISTANT:"
    chunks = [wrapped(chunk)["input_ids"] for chunk in text.split("<image>")]  # each with <s>, which is kept once
    asked, ids = list(chunks[0]), list(chunks[0])
    for chunk in chunks[1:]:
        asked += [-200, *chunk[1:]]
        ids += [447] * 16 + chunk[1:]
    return asked, ids


@torch.inference_mode()
def compute(model: Any, ids: list[int], pixels: np.ndarray | None) -> dict[str, np.ndarray]:
    """Every stage of a prompt and a greedy answer, through the cache."""
    found: dict[str, np.ndarray] = {}
    feeds: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    seen: dict[str, Any] = {}
    hooks = [
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _m, args: seen.update(vision=args[0])),
        model.model.multi_modal_projector.register_forward_hook(lambda _m, _a, out: seen.update(projector=out)),
        model.model.language_model.register_forward_pre_hook(
            lambda _m, _a, named: seen.update(inputs_embeds=named["inputs_embeds"]), with_kwargs=True
        ),
    ]
    if pixels is not None:
        feeds["pixel_values"] = torch.from_numpy(pixels)
    output = model(**feeds, use_cache=True)
    for hook in hooks:
        hook.remove()
    if pixels is not None:
        found["vision"] = seen["vision"].flatten(0, 1).numpy()
        found["projector"] = seen["projector"].flatten(0, 1).numpy()
        found["inputs_embeds"] = seen["inputs_embeds"][0].numpy()
    found["prefill_logits_last"] = output.logits[0, -1].numpy().copy()
    for layer in range(2):
        cache = output.past_key_values.layers[layer]
        found[f"past_key.{layer}"], found[f"past_value.{layer}"] = cache.keys[0].numpy(), cache.values[0].numpy()
    steps = [output.logits[0, -1].numpy()]
    cached = output.past_key_values
    found = {name: array.copy() for name, array in found.items()}  # the cache grows in place
    while len(steps) < STEPS:
        token = torch.tensor([[int(steps[-1].argmax())]])
        steps.append(model(input_ids=token, past_key_values=cached, use_cache=True).logits[0, -1].numpy())
    return {**found, "step_logits": np.stack(steps)}


def stage(name: str, array: np.ndarray) -> dict[str, Any]:
    layouts = {"vision": "[rows, C], class token first where it is kept", "projector": "[rows, D]"}
    return {
        "stage": name,
        "tensor": name,
        "shape": list(array.shape),
        "dtype": "F32",
        "part": None,
        "layout": layouts.get(name, "as in goldens/README.md"),
    }


def write_checkpoint(recipe: Recipe, model: Any, wrapped: Any, folder: Path) -> None:
    tensors = {renamed(name, recipe): value.numpy() for name, value in model.state_dict().items()}
    if recipe.config.tie_word_embeddings:
        tensors = {name: value for name, value in tensors.items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wrapped.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    if recipe.layout == "first":
        write_json(folder / "config.json", first_release_config(recipe.config))
        return
    config = {**json.loads(recipe.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
    write_json(folder / "config.json", config)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    recipe.processor.save_pretrained(folder)


def renamed(name: str, recipe: Recipe) -> str:
    """transformers 5 keeps in memory what it writes to no file: its own files have the tower below vision_model."""
    name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)
    if recipe.layout == "v4":
        name = name.replace("model.language_model.", "language_model.model.", 1)
        name = name.replace("lm_head.", "language_model.lm_head.", 1)
        return name.removeprefix("model.") if name.startswith("model.") else name
    if recipe.layout == "first":
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.", 1)
        name = name.replace("model.language_model.", "model.", 1)
        name = name.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.", 1)
        return name.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.", 1)
    return name


def first_release_config(config: LlavaConfig) -> dict[str, Any]:
    """The decoder's fields at the top; the tower by name, and here its own config, for it is no published one."""
    text = json.loads(config.text_config.to_json_string(use_diff=False))
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "eos_token_id", "bos_token_id")
    vision = json.loads(config.vision_config.to_json_string(use_diff=False))
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        **{name: text[name] for name in (*kept, *more)},
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "tiny-clip",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "vision_config": vision,
    }


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "goldens" / "llava")
