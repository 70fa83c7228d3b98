"""The chat template of a checkpoint: Jinja text that turns messages into the prompt's text.

It comes with the checkpoint, so it is run in Jinja's sandbox, with the settings and the few extras that
`apply_chat_template` of transformers gives it. The sandbox keeps it from Python and files, not from wasting time.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import InputError, PackageError

__all__ = ["ChatTemplate"]

# What a template's own expressions raise when messages do not fit them.
_RUN_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, name: str = "chat_template.jinja") -> None:
        """Raises PackageError where `source` is no template; `name` stands in messages."""
        self.source = source
        self.name = name
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        filters, names = cast("Any", environment).filters, cast("Any", environment).globals  # untyped in Jinja
        filters["tojson"] = _to_json
        names["raise_exception"] = _raise_exception
        names["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            asked = meta.find_undeclared_variables(environment.parse(source))
        except (TemplateSyntaxError, RecursionError) as error:
            raise PackageError(
                f"{name}: is not a chat template ({_line(error)}); export the checkpoint again"
            ) from error
        # What a caller may set: all that the template asks for and nothing else provides.
        self.variables = frozenset(asked - set(names) - {"messages", "tools", "documents"})

    def render(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The prompt's text. Raises InputError with the template's own words where it cannot take the messages."""
        try:
            return self._template.render(messages=list(messages), tools=None, documents=None, **options)
        except SecurityError as error:
            raise PackageError(f"{self.name}: does what a template must not ({_line(error)}); do not use it") from error
        except _RUN_ERRORS as error:
            raise InputError(
                f"messages: the chat template refuses them ({_line(error)}); change the messages"
            ) from error


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; for a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind of value that Jinja asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which transformers does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _line(error: BaseException) -> str:
    """An error's words on one line, cut to a readable length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
