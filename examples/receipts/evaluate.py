"""Measures a checkpoint on unseen receipts: greedy, free-running generation in PyTorch float32, exact match by kind.

python examples/receipts/evaluate.py examples/receipts/checkpoint --num 500 --seed 7
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import torch
from inputs import Picture, pixel_values, preprocess, prompt_ids, question_ids
from receipts import KINDS, MAX_NEW_TOKENS, drawn_example
from tokenizers import Tokenizer
from transformers import Qwen2_5_VLForConditionalGeneration


def load_model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    """The published float16 weights, computed with in float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def answer(model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, picture: Picture, question: str) -> str:
    """The greedy answer to one question about one image, without the end-of-turn token."""
    prompt = torch.tensor([prompt_ids(tokenizer, picture.num_tokens) + question_ids(tokenizer, question)])
    generated = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        mm_token_type_ids=(prompt == model.config.image_token_id).int(),
        pixel_values=torch.from_numpy(pixel_values(picture.patches)),
        image_grid_thw=torch.tensor([[1, *picture.grid]]),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
    )
    return tokenizer.decode(generated[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact match of a receipts checkpoint on held-out receipts.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures and every wrong answer to this file")
    args = parser.parse_args()
    model, tokenizer = load_model(args.checkpoint), Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    asked, right, wrong = Counter(), Counter(), []
    begun = time.monotonic()
    for index in range(args.num):
        example = drawn_example("heldout", args.seed, index)
        said = answer(model, tokenizer, preprocess(example.image), example.question)
        asked[example.kind] += 1
        right[example.kind] += said == example.answer
        if said != example.answer:
            entry = {"index": index, "kind": example.kind, "question": example.question}
            wrong.append(entry | {"answer": example.answer, "said": said})
    for kind in KINDS:
        if asked[kind]:
            print(f"{kind:8} {right[kind]:4d} of {asked[kind]:4d}  {right[kind] / asked[kind]:.1%}")
    exact, seconds = right.total() / args.num, time.monotonic() - begun
    print(f"{'all':8} {right.total():4d} of {args.num:4d}  {exact:.1%}  {seconds:.0f} s")
    if args.json:
        by_kind = {kind: right[kind] / asked[kind] for kind in KINDS if asked[kind]}
        figures = {"num": args.num, "seed": args.seed, "exact": exact, "by_kind": by_kind, "wrong": wrong}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
