"""The checkpoint's own files that go into a package, and what they say about generation."""

from collections.abc import Mapping
from typing import Any

from ..runtime.errors import CheckpointError
from ..runtime.manifest import GenerationDefaults
from .checkpoint import Checkpoint
from .family import Json
from .fields import read_field

__all__ = [
    "DOCUMENTS",
    "TEMPLATE",
    "chat_template",
    "collect_documents",
    "generation_defaults",
    "leading_tokens",
    "special_tokens",
    "token_id",
]

TEMPLATE = "chat_template.jinja"
DOCUMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


def collect_documents(
    checkpoint: Checkpoint, *, with_prompt: bool, template: str | None = None, prologue: str = ""
) -> dict[str, bytes]:
    """Content of each file by name, as the checkpoint has them; with a prompt also the chat template.

    `template`: the family's own, in place of the checkpoint's; `prologue` stands in front of either. Raises
    CheckpointError where a prompt needs a file that is not there.
    """
    found = {name: checkpoint.path / name for name in DOCUMENTS if (checkpoint.path / name).is_file()}
    documents = {name: path.read_bytes() for name, path in found.items()}
    if with_prompt:
        if "tokenizer.json" not in documents:
            raise CheckpointError(
                f"{checkpoint.path}: has no tokenizer.json; save the tokenizer again with transformers (fast tokenizer)"
            )
        documents[TEMPLATE] = (prologue + (chat_template(checkpoint) if template is None else template)).encode()
    return documents


def chat_template(checkpoint: Checkpoint) -> str:
    """The template, from whichever of the three places this checkpoint keeps it in; the processor's own goes first."""
    file = checkpoint.path / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = checkpoint.documents.get(name, {}).get("chat_template")
        if isinstance(template, list):  # several by name, of which transformers takes this one where none is asked for
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{checkpoint.path}: has no chat template ({TEMPLATE}, chat_template.json or tokenizer_config.json)"
    )


def token_id(documents: Mapping[str, Json], text: str) -> int:
    """Id of an added token, by tokenizer.json. Raises CheckpointError where the file has none of that text."""
    added = documents.get("tokenizer.json", {}).get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == text and isinstance(token.get("id"), int):
            return token["id"]
    raise CheckpointError(
        f"tokenizer.json: missing, or has no added token {text!r}; copy it from the checkpoint that this one was "
        "tuned from"
    )


def special_tokens(documents: Mapping[str, Json]) -> tuple[str, ...]:
    """Texts of all special tokens of tokenizer.json, in order."""
    added = documents.get("tokenizer.json", {}).get("added_tokens")
    tokens = [token for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
    return tuple(str(token.get("content")) for token in tokens if token.get("special"))


def leading_tokens(documents: Mapping[str, Json]) -> tuple[str, ...]:
    """What the tokenizer's own template puts in front of every text, by tokenizer.json: `<s>`, or nothing.

    Raises CheckpointError where it also puts something behind, for a prompt goes on.
    """
    processor = documents.get("tokenizer.json", {}).get("post_processor")
    parts: list[Json] = [processor] if isinstance(processor, dict) else []
    if parts and parts[0].get("type") == "Sequence":
        parts = list(parts[0].get("processors", ()))
    single = next((part.get("single", ()) for part in parts if part.get("type") == "TemplateProcessing"), ())
    places = [piece.get("SpecialToken", {}).get("id") for piece in single]
    text = places.index(None) if None in places else len(places)
    if places[text + 1 :]:
        raise CheckpointError(
            f"tokenizer.json: puts {places[-1]!r} behind every text, which ends a prompt; save the tokenizer "
            "again with add_eos_token false"
        )
    return tuple(places[:text])


def generation_defaults(generation: Json, fallback_eos: Any, *, penalty_sees_prompt: bool = True) -> GenerationDefaults:
    """generation_config.json as the runtime obeys it.

    `fallback_eos` is eos_token_id of config.json, for where the file has none. `penalty_sees_prompt` is False where
    upstream generates from embeddings. Raises CheckpointError on a bad field.
    """
    file = "generation_config.json"
    own = generation.get("eos_token_id")
    eos = fallback_eos if own is None else own
    tokens = eos if isinstance(eos, list) else [eos]
    if not tokens or not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise CheckpointError(f"{file}: eos_token_id is {eos!r}, there or in config.json; give one token id or a list")
    return GenerationDefaults(
        eos_token_ids=tuple(tokens),
        do_sample=read_field(generation, "do_sample", bool, False, file=file),
        temperature=read_field(generation, "temperature", float, 1.0, file=file),
        top_k=read_field(generation, "top_k", int, 50, file=file),  # transformers' default where the file is silent
        top_p=read_field(generation, "top_p", float, 1.0, file=file),
        repetition_penalty=read_field(generation, "repetition_penalty", float, 1.0, file=file),
        penalty_sees_prompt=penalty_sees_prompt,
    )
