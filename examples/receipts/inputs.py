"""Turns an image and a question into the model's inputs, as Qwen2.5-VL's own processor does (Pillow's bicubic resize).

Dims: N patches, H W pixels, h w patches along a side, T tokens.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

PATCH = 14
MERGE = 2
BLOCK = PATCH * MERGE
MIN_PIXELS = 4 * BLOCK * BLOCK
MAX_PIXELS = 256 * BLOCK * BLOCK
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Picture:
    """One preprocessed image: uint8 patches [N, 3 * 14 * 14] in merge-block order, and its grid (h, w) in patches."""

    patches: np.ndarray
    grid: tuple[int, int]

    @property
    def num_tokens(self) -> int:
        """Rows that the image takes in the prompt."""
        return len(self.patches) // (MERGE * MERGE)


def smart_resize(height: int, width: int) -> tuple[int, int]:
    """Nearest size in multiples of 28 pixels whose area lies between MIN_PIXELS and MAX_PIXELS (Qwen2-VL's rule)."""
    new_height, new_width = round(height / BLOCK) * BLOCK, round(width / BLOCK) * BLOCK
    if new_height * new_width > MAX_PIXELS:
        shrink = (height * width / MAX_PIXELS) ** 0.5
        new_height = max(BLOCK, int(height / shrink / BLOCK) * BLOCK)
        new_width = max(BLOCK, int(width / shrink / BLOCK) * BLOCK)
    elif new_height * new_width < MIN_PIXELS:
        grow = (MIN_PIXELS / (height * width)) ** 0.5
        new_height = -int(-height * grow // BLOCK) * BLOCK
        new_width = -int(-width * grow // BLOCK) * BLOCK
    return new_height, new_width


def preprocess(image: np.ndarray) -> Picture:
    """Resize uint8 [H, W, 3] and cut it into patches; normalisation is left to `pixel_values`."""
    height, width = smart_resize(*image.shape[:2])
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    h, w = height // PATCH, width // PATCH
    cut = resized.reshape(h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    ordered = cut.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, block column, row and column in the block, channel, y, x
    return Picture(ordered.reshape(h * w, 3 * PATCH * PATCH), (h, w))


def normalise(patches: np.ndarray) -> np.ndarray:
    """float32 [N, 588] from uint8 [N, 588]."""
    mean, std = (np.repeat(np.array(values, dtype=np.float32), PATCH * PATCH) for values in (MEAN, STD))
    return (patches * np.float32(1 / 255) - mean) / std


def pixel_values(patches: np.ndarray) -> np.ndarray:
    """float32 [N, 1176] from uint8 [N, 588]: normalised, the one frame repeated to the temporal patch of two."""
    return np.repeat(normalise(patches).reshape(-1, 3, 1, PATCH * PATCH), 2, axis=2).reshape(len(patches), -1)


def prompt_ids(tokenizer: Tokenizer, num_image_tokens: int) -> list[int]:
    """Tokens up to and including the image: system turn, then the start of the user's turn."""
    image = "<|vision_start|>" + "<|image_pad|>" * num_image_tokens + "<|vision_end|>"
    return tokenizer.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{image}").ids


def question_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """Tokens after the image: the question, the end of the user's turn and the start of the assistant's."""
    return tokenizer.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n").ids


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Tokens of the answer and of the end of the turn."""
    return tokenizer.encode(f"{answer}<|im_end|>").ids


def image_positions(prompt_length: int, picture: Picture) -> np.ndarray:
    """M-RoPE positions [3, T] (time, row, column) of a prompt from `prompt_ids`; the image is followed by one token."""
    before = prompt_length - picture.num_tokens - 1
    rows, columns = picture.grid[0] // MERGE, picture.grid[1] // MERGE
    grid = np.stack(np.broadcast_arrays(0, *np.indices((rows, columns)))).reshape(3, -1)
    lead = np.broadcast_to(np.arange(before), (3, before))
    after = np.full((3, 1), before + max(rows, columns))
    return np.concatenate([lead, before + grid, after], axis=1)
