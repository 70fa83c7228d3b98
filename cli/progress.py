"""Progress of long work on stderr: a bar on a terminal, a plain line every tenth elsewhere (logs, pipes, CI)."""

import sys
import time
from types import TracebackType
from typing import TextIO

__all__ = ["Progress"]

_BAR_WIDTH = 24
_REDRAW_SECONDS = 0.1
_LINE_STEPS = 10  # plain lines for a whole piece of work


class Progress:
    """A callback `progress(done, total, what)`, to be handed to whatever takes long. Use it in a `with` block.

    `done` counts up to `total` in any unit (tensors, bytes, questions); `what` says what is at work now. Work in
    several parts may start again at 0, each part with its own `total`.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.started = time.monotonic()
        self._drawn_at = 0.0
        self._drawn_width = 0
        self._done = -1
        self._step = -1

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Clears the bar, so that what follows (a table, an error) starts on a clean line."""
        if self._drawn_width:
            self.stream.write("\r" + " " * self._drawn_width + "\r")
            self.stream.flush()
            self._drawn_width = 0

    def __call__(self, done: int, total: int, what: str = "") -> None:
        """Reports that `done` of `total` are finished. Raises ValueError where 0 <= done <= total does not hold."""
        if not 0 <= done <= total:
            raise ValueError(f"progress of {self.title}: {done} of {total}")
        fraction = done / total if total else 1.0
        if self.is_terminal:
            self._draw(fraction, what, final=done == total)
        else:
            self._print(done, fraction, what)

    def _draw(self, fraction: float, what: str, *, final: bool) -> None:
        now = time.monotonic()
        if not final and now - self._drawn_at < _REDRAW_SECONDS:
            return
        filled = round(fraction * _BAR_WIDTH)
        line = f"{self.title} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {fraction:4.0%} {what}"[:100]
        self.stream.write("\r" + line.ljust(self._drawn_width))
        self.stream.flush()
        self._drawn_at, self._drawn_width = now, len(line)

    def _print(self, done: int, fraction: float, what: str) -> None:
        if done < self._done:  # the next part of the work
            self._step = -1
        self._done = done
        step = int(fraction * _LINE_STEPS)
        if step == self._step or step == 0:
            return
        self._step = step
        seconds = time.monotonic() - self.started
        print(f"{self.title} {fraction:4.0%} {seconds:6.1f} s {what}".rstrip(), file=self.stream, flush=True)
