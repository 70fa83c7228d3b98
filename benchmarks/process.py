"""Processes that are measured from outside: memory of a whole tree, bytes read and written. Linux alone, by /proc.

A process is sampled every 20 ms. The kernel's own high-water mark of each process (VmHWM) catches what falls between
two samples, as far as a single process goes.
"""

import contextlib
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Actor", "Finished", "Memory", "TreeWatch", "reset_peak", "run_watched", "tree"]

_INTERVAL = 0.02  # seconds between samples


@dataclass(frozen=True)
class Memory:
    """Resident set of one process in bytes. Pages of mapped files count, as in every tool; `anonymous` lacks them."""

    resident: int
    anonymous: int
    peak: int  # the largest resident set so far, by the kernel

    @classmethod
    def of(cls, pid: int | str = "self") -> "Memory":
        """Raises OSError where the process is gone, ValueError where it is about to be."""
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines())
        if "VmRSS" not in fields:
            raise ValueError(f"process {pid} has no memory any more")
        return cls(*(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")))


@dataclass(frozen=True)
class Finished:
    """A command that ended. Bytes are those that its processes asked for by read and write, from cache or disk."""

    seconds: float
    peak_tree: int  # resident bytes of all processes together
    peak_process: int  # of the largest one, by the kernel
    num_processes: int
    bytes_read: int
    bytes_written: int
    disk_read: int  # what of it came from the disk
    disk_written: int


class TreeWatch:
    """Samples a process and all below it until the block ends."""

    def __init__(self, pid: int) -> None:
        self.peak_tree = 0
        self.peak_process = 0
        self.pids: set[int] = set()
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            together = 0
            for pid in tree(self._pid):
                with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
                    memory = Memory.of(pid)
                    together += memory.resident
                    self.peak_process = max(self.peak_process, memory.peak)
                    self.pids.add(pid)
            self.peak_tree = max(self.peak_tree, together, self.peak_process)
            if self._stop.wait(_INTERVAL):
                return


def tree(pid: int) -> Iterator[int]:
    """A process and everything that it has started."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text("ascii").split():
                    yield from tree(int(child))


def run_watched(command: Sequence[str], log: Path) -> Finished:
    """Runs a command to its end; what it prints goes to `log`. Raises CalledProcessError where it fails."""
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        with TreeWatch(process.pid) as watch:
            # Its counters are read when it has ended and nobody has collected it: those of its children are in them.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            seconds = time.perf_counter() - started
            text = Path(f"/proc/{process.pid}/io").read_text("ascii")
    status = process.wait()
    if status != 0:
        raise subprocess.CalledProcessError(status, command, log.read_bytes().decode(errors="replace"))
    io = {name: int(value) for name, value in (line.split(":") for line in text.splitlines())}
    return Finished(
        seconds=seconds,
        peak_tree=watch.peak_tree,
        peak_process=watch.peak_process,
        num_processes=len(watch.pids),
        bytes_read=io["rchar"],
        bytes_written=io["wchar"],
        disk_read=io["read_bytes"],
        disk_written=io["write_bytes"],
    )


def reset_peak() -> None:
    """Lets the kernel's high-water mark of this process start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")


class Actor:
    """An object in a process of its own: `ask("method", ...)` calls it there and brings the answer back."""

    def __init__(self, factory: Callable[..., Any], *arguments: Any) -> None:
        """`factory` is found by its name in the other process, so it stands at the top of a module."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, factory, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()  # the other side reads the end and returns
        self._process.join()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError where the other process ends instead of answering; its traceback is on stderr."""
        self._connection.send((method, arguments))
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{method}: its process ended with status {self._process.exitcode}") from None


def _serve(connection: Any, factory: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    target: Any = None
    while True:
        try:
            method, given = connection.recv()
        except EOFError:
            return
        target = factory(*arguments) if target is None else target
        connection.send(getattr(target, method)(*given))
