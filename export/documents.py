"""The checkpoint's own files that go into a package, and what they say about generation."""

from collections.abc import Mapping
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import GenerationDefaults
from .checkpoint import Checkpoint
from .family import Json
from .fields import read_field

__all__ = ["DOCUMENTS", "TEMPLATE", "chat_template", "collect_documents", "generation_defaults", "image_processor"]

TEMPLATE = "chat_template.jinja"
DOCUMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def collect_documents(checkpoint: Checkpoint, *, with_prompt: bool) -> dict[str, bytes]:
    """Content of each file by name, as the checkpoint has them; with a prompt also the chat template.

    Raises CheckpointError where a prompt needs a file that is not there.
    """
    found = {name: checkpoint.path / name for name in DOCUMENTS if (checkpoint.path / name).is_file()}
    documents = {name: path.read_bytes() for name, path in found.items()}
    if with_prompt:
        if "tokenizer.json" not in documents:
            raise CheckpointError(
                f"{checkpoint.path}: has no tokenizer.json; save the tokenizer again with transformers (fast tokenizer)"
            )
        documents[TEMPLATE] = chat_template(checkpoint).encode()
    return documents


def chat_template(checkpoint: Checkpoint) -> str:
    """The template, from whichever of the three places this checkpoint keeps it in; the processor's own goes first."""
    file = checkpoint.path / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = checkpoint.documents.get(name, {}).get("chat_template")
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{checkpoint.path}: has no chat template ({TEMPLATE}, chat_template.json or tokenizer_config.json)"
    )


def image_processor(documents: Mapping[str, Json]) -> Json:
    """Settings of the image processor: preprocessor_config.json, or as transformers 5 saves them.

    Raises CheckpointError where the checkpoint has neither: sizes and colours that are guessed change answers.
    """
    own = documents.get("preprocessor_config.json") or documents.get("processor_config.json", {}).get("image_processor")
    if not isinstance(own, dict):
        raise CheckpointError(
            "preprocessor_config.json: missing (and no image_processor in processor_config.json); "
            "copy it from the checkpoint that this one was tuned from"
        )
    return own


def generation_defaults(generation: Json, fallback_eos: Any) -> GenerationDefaults:
    """generation_config.json as the runtime obeys it.

    `fallback_eos` is eos_token_id of config.json, for where the file has none.
    """
    eos = generation.get("eos_token_id", fallback_eos)
    tokens = eos if isinstance(eos, list) else [eos]
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise CheckpointError(
            f"generation_config.json: eos_token_id is {eos!r}, there or in config.json; give one token id or a list"
        )
    return GenerationDefaults(
        eos_token_ids=tuple(tokens),
        do_sample=read_field(generation, "do_sample", bool, False),
        temperature=read_field(generation, "temperature", float, 1.0),
        top_k=read_field(generation, "top_k", int, 50),  # transformers' default where the file is silent
        top_p=read_field(generation, "top_p", float, 1.0),
        repetition_penalty=read_field(generation, "repetition_penalty", float, 1.0),
    )
