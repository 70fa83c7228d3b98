"""The command `vlmport`: finds the command, runs it, and turns errors into one line and an exit status.

Status 0: done and within the gates. 1: a gate failed. 2: a mistake of the user. 130: interrupted.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from ..runtime.errors import VlmportError

__all__ = ["COMMANDS", "main"]

# Command -> help. The file of the same name is imported only when the command is called, so that a box with nothing but
# the runtime can run, verify and inspect.
COMMANDS = {
    "export": "make a package from a checkpoint",
    "quantize": "add a variant to a package",
    "prepare": "make a package load faster and leaner on this box",
    "run": "answer a prompt about images and videos",
    "validate": "compare a package with its reference, stage by stage",
    "verify": "check the files of a package, then its golden case, on this box",
    "inspect": "show what a package holds",
    "bench": "measure time and memory of a variant on this box",
}

# Modules that only an extra brings. What is missing from elsewhere is a bug and keeps its traceback.
_EXTRAS = {
    "av": "video",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "safetensors": "export",
    "torch": "export",
    "transformers": "export",
}

_MISTAKE = 2
_INTERRUPTED = 128 + 2  # as shells tell SIGINT
_PIPE_CLOSED = 128 + 13  # and SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vlmport` with `argv` (default: the arguments of the process) and returns the exit status."""
    if sys.stdout is None:  # `>&-`
        return _complain("standard output is closed; redirect it to a file or to /dev/null")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # warnings are for programmers: Pillow has some for images that are merely odd
                warnings.simplefilter("ignore")
            status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, so that a closed pipe is met inside this block
        return status
    except VlmportError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`, `less`) has what it wanted. Python would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno is None:
            raise
        place = f"{error.filename}: " if error.filename is not None else ""
        return _complain(f"{place}{os.strerror(error.errno)}")
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _complain(f"{error.name} is not installed; add it with `pip install 'vlmport[{extra}]'`")


def _run(arguments: list[str]) -> int:
    try:
        parser, modules = _parser(arguments)
        parsed = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help, the version or the mistake
        return stop.code if isinstance(stop.code, int) else _MISTAKE
    return modules[parsed.command].execute(parsed)


class _Parser(argparse.ArgumentParser):
    """A parser that tells a wrong argument as any other mistake, in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_complain(f"{message} (see `{self.prog} --help`)"))


def _parser(arguments: list[str]) -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    """The parser, with the options of the one command that is called; and the module of that command."""
    parser = _Parser(
        prog="vlmport",
        description="Ports vision-language models to ONNX and proves how close they stay.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    called = next((word for word in arguments if not word.startswith("-")), None)
    modules: dict[str, ModuleType] = {}
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=f"{help_text.capitalize()}.", allow_abbrev=False
        )
        if name == called:
            modules[name] = importlib.import_module(f".{name}", __package__)
            modules[name].add_arguments(command)
    return parser, modules


def _version() -> str:
    return f"vlmport {importlib.metadata.version('vlmport')} (Python {platform.python_version()})"


def _complain(message: str) -> int:
    """One line that cannot steer a terminal: file names and packages may hold escape sequences."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(message.split()))
    print(f"vlmport: error: {line}", file=sys.stderr)
    return _MISTAKE


if __name__ == "__main__":
    sys.exit(main())
