"""Trains the demo's tokenizer: Qwen2's byte-level BPE and special tokens, merges learnt from receipts and questions."""

import random

from inputs import SYSTEM
from receipts import KINDS, ask, make_receipt
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCAB_SIZE = 736
SPECIAL = (  # in the order of their ids; the last eight are added tokens that Qwen does not mark as special
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
NOT_SPECIAL = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)
PATTERN = (  # Qwen2's: digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_RECEIPTS = 2000


def corpus() -> list[str]:
    """Texts to learn merges from: the turns of a conversation, and what is asked and said about training receipts."""
    texts = [f"system\n{SYSTEM}", "user\n", "assistant\n"] * 200
    for index in range(NUM_RECEIPTS):
        receipt = make_receipt("train", 1, index)
        item = random.Random(index).choice(receipt.items)
        examples = [ask(receipt, kind, item) for kind in KINDS]
        texts += [part for example in examples for part in (example.question, example.answer)]
    return texts


def train_tokenizer() -> Tokenizer:
    """A tokenizer of VOCAB_SIZE tokens: 256 bytes, merges, then the 22 tokens of Qwen2.5-VL in their own order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False, add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = VOCAB_SIZE - len(SPECIAL) - len(NOT_SPECIAL)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in NOT_SPECIAL])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer
