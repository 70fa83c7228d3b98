"""Progress of long work on stderr: a bar on a terminal, a plain line every tenth elsewhere (logs, pipes, CI).

Both tell the time that is left, by the mean rate of the part of the work that is going on.
"""

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
_LEFT_SECONDS = 2.0  # of work before what is left is told: the first steps are no rate yet


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
        self._part = _Part(0, 0, self.started)
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
        if total and (done < self._part.done or total != self._part.total):
            self._part, self._step = _Part(done, total, time.monotonic()), 0
        if total:
            self._part.done = done
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
            bar = "#" * filled + "." * (_BAR_WIDTH - filled)
            line = f"{self.title} [{bar}] {done / total:4.0%} {self._part.left()}{what}"
        line = line[:_LINE_WIDTH]
        self.stream.write("\r" + line.ljust(self._drawn_width))
        self.stream.flush()
        self._shown_at, self._drawn_width = now, len(line)

    def _print_start(self, what: str) -> None:
        if what != self._what:
            print(f"{self.title} {what}", file=self.stream, flush=True)
        self._what = what

    def _print_step(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        step = done * _LINE_STEPS // total
        if step == self._step or (done < total and now - self._shown_at < _LINE_SECONDS):
            return
        self._step, self._shown_at = step, now
        seconds = now - self.started
        text = f"{self.title} {done / total:4.0%} {seconds:6.1f} s {self._part.left()}{what}"
        print(text.rstrip(), file=self.stream, flush=True)


class _Part:
    """A part of the work: where it began and where it is, in its own unit."""

    def __init__(self, done: int, total: int, started: float) -> None:
        self.first = self.done = done
        self.total, self.started = total, started

    def left(self) -> str:
        """ "12 min left, ", or nothing where it is done or there is no rate yet."""
        seconds = time.monotonic() - self.started
        if self.done in (self.first, self.total) or seconds < _LEFT_SECONDS:
            return ""
        return f"{_duration(seconds / (self.done - self.first) * (self.total - self.done))} left, "


def _duration(seconds: float) -> str:
    """In the unit that a person would say it in: 42 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
