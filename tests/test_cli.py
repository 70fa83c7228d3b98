"""The command line: its options are frozen, its exit status means something, a user's mistake is one line."""

import argparse
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.cli import main as cli
from vlmport.cli.progress import Progress
from vlmport.cli.table import table
from vlmport.runtime.errors import InputError

# A change here is a change for everybody's scripts: the changelog has to tell it.
CALIBRATION = (
    *("--method", "--calibration", "--calibration-samples", "--kv-cache"),
    *("--calibration-weights", "--calibration-seed"),
)
OPTIONS = {
    "export": ["CHECKPOINT", "-o/--output", "--recipe", "--block-size", *CALIBRATION, "--target", "--overwrite"],
    "quantize": [
        *("PACKAGE", "--recipe", "--block-size", *CALIBRATION),
        *("--max-size", "--max-kl", "--name", "--checkpoint"),
    ],
    "prepare": ["PACKAGE", "--variant", "--list", "--remove", "--json"],
    "run": [
        *("PACKAGE", "PROMPT", "--image", "--video", "--system", "--variant", "--json"),
        *("--max-new-tokens", "--stop", "--cache-length", "--max-pixels", "--fps", "--option"),
        *("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed"),
        *("--embedding", "--token-drop", "--max-patches", "--threads", "--cuda-graph"),
    ],
    "validate": [
        *("PACKAGE", "--reference", "--golden", "--against", "--variant", "--task", "--trust-remote-code"),
        *("--report", "--gates", "--limit", "--bisect", "--no-sweep", "--no-insides", "--json"),
    ],
    "verify": ["PACKAGE", "--variant", "--json"],
    "inspect": ["PACKAGE", "--json", "--placement", "--variant", "--report"],
    "bench": ["PACKAGE", "--variant", "--image", "--max-new-tokens", "--repeats", "--json"],
}


def options(command: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"vlmport.cli.{command}").add_arguments(parser)
    return [
        "/".join(action.option_strings) or str(action.metavar)
        for action in parser._actions  # argparse has no public list of them
    ]


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_frozen(command: str) -> None:
    assert options(command) == OPTIONS[command]


def test_every_command_is_frozen_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(OPTIONS) == set(cli.COMMANDS)
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        assert f"usage: vlmport {command}" in capsys.readouterr().out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], None]:
    """Puts a command `fake` beside the real ones; what it does is the test's."""

    def install(act: Callable[[], int]) -> None:
        module = ModuleType("vlmport.cli.fake")
        module.add_arguments = lambda parser: None  # pyright: ignore[reportAttributeAccessIssue]
        module.execute = lambda args: act()  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "vlmport.cli.fake", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "nothing")

    return install


def raising(error: BaseException) -> Callable[[], int]:
    def act() -> int:
        raise error

    return act


def test_warnings_are_no_noise(fake: Callable[..., None], recwarn: pytest.WarningsRecorder) -> None:
    fake(lambda: warnings.warn("Palette images with Transparency", stacklevel=1) or 0)
    assert cli.main(["fake"]) == 0
    assert not recwarn.list


@pytest.mark.parametrize("status", [0, 1])
def test_status_of_the_command_is_the_status(fake: Callable[..., None], status: int) -> None:
    fake(lambda: status)
    assert cli.main(["fake"]) == status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a.png: zero bytes;\n copy it again"), 2, "vlmport: error: a.png: zero bytes; copy it again"),
        (KeyboardInterrupt(), 130, "vlmport: error: interrupted"),
        (PermissionError(13, "no", "/some/folder"), 2, "vlmport: error: /some/folder: Permission denied"),
        (OSError(28, "no"), 2, "vlmport: error: No space left on device"),
        (
            ModuleNotFoundError("no", name="torch.onnx"),
            2,
            "vlmport: error: torch.onnx is not installed; add it with `pip install 'vlmport[export]'`",
        ),
    ],
)
def test_mistakes_are_one_line(
    fake: Callable[..., None], capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    fake(raising(error))
    assert cli.main(["fake"]) == status
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    "error", [KeyError("ours"), ModuleNotFoundError("no", name="vlmport.runtime.gone"), OSError("x")]
)
def test_our_own_bugs_keep_their_traceback(fake: Callable[..., None], error: Exception) -> None:
    fake(raising(error))
    with pytest.raises(type(error)):
        cli.main(["fake"])


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["inspect"], ["inspect", "a", "--nonsense"], ["--jso"]])
def test_wrong_arguments_are_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"vlmport: error: .+ \(see `vlmport( inspect)? --help`\)\n", captured.err)
    assert captured.out == ""


def test_a_mistake_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "a\x1b[31m\udcffb\u202e"]) == 2
    assert capsys.readouterr().err.startswith(r"vlmport: error: a\x1b[31m\udcffb\u202e: not a package")


def test_a_closed_stdout_is_told() -> None:
    command = f"{shlex.quote(sys.executable)} -m vlmport.cli.main --version >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard output is closed" in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlmport 0.")


def test_installed_command_works() -> None:
    command = os.path.join(os.path.dirname(sys.executable), "vlmport")
    done = subprocess.run([command, "inspect", "/nowhere"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("vlmport: error: /nowhere")


def test_closed_pipe_is_quiet() -> None:
    """`vlmport ... | head`: the reader goes away before all is printed."""
    code = (
        "import sys, types\nfrom vlmport.cli import main as cli\nfake = types.ModuleType('vlmport.cli.fake')\n"
        "fake.add_arguments = lambda parser: None\nfake.execute = lambda args: print('x' * 1000000) or 0\n"
        "sys.modules['vlmport.cli.fake'] = fake\ncli.COMMANDS['fake'] = 'nothing'\nsys.exit(cli.main(['fake']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 141


def test_table_aligns() -> None:
    assert (
        table(("name", "size"), [("a", "1.0"), ("longer", "10.0")], "<>") == "name    size\na        1.0\nlonger  10.0"
    )
    assert table((), [("a", "b")]) == "a  b"
    assert table((), []) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_leaves_no_trace() -> None:
    stream = Terminal()
    with Progress("export", stream) as progress:
        for done in range(101):
            progress(done, 100, f"tensor {done}")
    text = stream.getvalue()
    assert "\n" not in text
    assert "100% tensor 100" in text
    assert text.endswith("\r")
    assert text.split("\r")[-2].strip() == ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time for Progress; a test moves it by writing `clock[0]`."""
    now = [0.0]
    monkeypatch.setattr("vlmport.cli.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress_is_at_most_ten_plain_lines_elsewhere(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("export", stream) as progress:
        for done in range(1001):
            clock[0] += 1.0
            progress(done, 1000, "decoder")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("export 100%")
    assert "\r" not in stream.getvalue()


def test_progress_of_short_parts_is_a_line_each(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress("export", stream) as progress:
        progress(0, 0, "tracing decoder")
        progress(0, 0, "tracing decoder")
        clock[0] += 2.0
        for part in ("a", "b"):
            for done in range(101):
                progress(done, 100, part)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[0] == ["export", "tracing", "decoder"]
    assert [line[1] + line[-1] for line in lines if line[1] == "100%"] == ["100%a", "100%b"]
    assert len(lines) <= 4


def test_progress_tells_what_is_left_of_the_part_that_goes_on(clock: list[float]) -> None:
    def line_of(done: int, total: int, seconds: float) -> str:
        clock[0] += seconds
        stream.truncate(0)
        progress(done, total, "0007")
        return stream.getvalue().strip()

    stream = io.StringIO()
    with Progress("validate", stream) as progress:
        progress(100, 1100, "on record")
        assert line_of(300, 1100, 1.0).endswith("s 0007"), "no rate yet"
        assert line_of(500, 1100, 19.0).endswith("s 30 s left, 0007"), "600 at 20 a second"
        assert line_of(600, 1100, 980.0).endswith("s 17 min left, 0007")
        assert line_of(1100, 1100, 1.0).endswith("s 0007")
        progress(0, 10, "another part")
        assert line_of(2, 10, 3600.0).endswith("s 4.0 h left, 0007")
    terminal = Terminal()
    with Progress("validate", terminal) as progress:
        progress(0, 4)
        clock[0] += 9.0
        progress(3, 4, "0007")
    assert "75% 3 s left, 0007" in terminal.getvalue()


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_progress_takes_any_sound_count_and_refuses_others(done: int, total: int) -> None:
    progress = Progress("x", io.StringIO())
    if done <= total:
        progress(done, total)
    else:
        with pytest.raises(ValueError, match="progress of x"):
            progress(done, total)
