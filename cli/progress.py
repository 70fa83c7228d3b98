"""Progress of long work on stderr: a bar on a terminal, a plain line every tenth elsewhere (logs, pipes, CI)."""

import sys
import time
from types import TracebackType
from typing import TextIO

__all__ = ["Progress"]

_BAR_WIDTH = 24
_LINE_WIDTH = 79  # a longer line would wrap, and the next one could not go over it
_REDRAW_SECONDS = 0.1
_LINE_STEPS = 10  # plain lines for a whole piece of work, at most
_LINE_SECONDS = 1.0  # and one a second, at most, until it is done


class Progress:
    """A callback `progress(done, total, what)`, to be handed to whatever takes long. Use it in a `with` block.

    `done` counts up to `total` in any unit (tensors, bytes, questions); `what` says what is at work now. Work in
    several parts may start again at 0, each part with its own `total`. A `total` of 0 is work that cannot be counted.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self.started = time.monotonic()
        self._shown_at = -_LINE_SECONDS
        self._drawn_width = 0
        self._done = -1
        self._step = 0
        self._what = ""

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
        if self.is_terminal:
            self._draw(done, total, what)
        elif total == 0:
            self._print_start(what)
        else:
            self._print_step(done, total, what)

    def _draw(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if 0 < total != done and now - self._shown_at < _REDRAW_SECONDS:
            return
        line = f"{self.title} {what}"
        if total:
            filled = round(done / total * _BAR_WIDTH)
            line = f"{self.title} [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {done / total:4.0%} {what}"
        line = line[:_LINE_WIDTH]
        self.stream.write("\r" + line.ljust(self._drawn_width))
        self.stream.flush()
        self._shown_at, self._drawn_width = now, len(line)

    def _print_start(self, what: str) -> None:
        if what != self._what:
            print(f"{self.title} {what}", file=self.stream, flush=True)
        self._what = what

    def _print_step(self, done: int, total: int, what: str) -> None:
        if done < self._done:  # the next part of the work
            self._step = 0
        self._done = done
        now = time.monotonic()
        step = done * _LINE_STEPS // total
        if step == self._step or (done < total and now - self._shown_at < _LINE_SECONDS):
            return
        self._step, self._shown_at = step, now
        seconds = now - self.started
        print(f"{self.title} {done / total:4.0%} {seconds:6.1f} s {what}".rstrip(), file=self.stream, flush=True)
