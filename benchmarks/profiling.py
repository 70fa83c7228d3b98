"""Where the time of a stage goes: ONNX Runtime's own profile, summed by operator."""

import json
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmport.cli.bench import drawn_image
from vlmport.runtime.decoder import Decoder
from vlmport.runtime.model import Model
from vlmport.runtime.pages import join_pages
from vlmport.runtime.session import GraphSession, open_session
from vlmport.runtime.vision_inputs import vision_inputs

__all__ = ["OperatorTime", "Profiler", "self_times"]


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator together."""

    operator: str
    seconds: float  # of a run, without what runs inside a node (loops)
    share: float  # of all operators
    num_calls: float  # of a run


class Profiler:
    """Runs stages of a variant under the profiler of ONNX Runtime."""

    def __init__(self, package: Path, variant: str) -> None:
        self.model = Model.load(package, variant)
        self._folder = Path(tempfile.mkdtemp(prefix="vlmport-profile-"))

    def vision(self, size: tuple[int, int]) -> list[OperatorTime]:
        """One image (width, height) through the vision encoder, after a run that warms up."""
        content = [{"type": "image", "image": drawn_image(*size)}, {"type": "text", "text": "Describe."}]
        visuals = self.model.prepare([{"role": "user", "content": content}]).visuals
        feeds: dict[str, Any] = {"pixel_values": np.concatenate([visual.pixel_values for visual in visuals])}
        if self.model.manifest.vision is not None:
            feeds |= vision_inputs(self.model.manifest.vision, [visual.grid for visual in visuals])
        session = self._open("vision_encoder")
        for _ in range(2):
            session.run(feeds)
        return self._finish(session, skip=1, runs=1)

    def decoder(self, context: int, num_steps: int) -> tuple[list[OperatorTime], list[OperatorTime]]:
        """A prefill of `context` tokens, then decode steps on top of it."""
        session = self._open("decoder")
        join_pages()  # as it is for who loads a package, a little later
        decoder = Decoder(session, self.model.cache_spec, chunk=context)
        cache = decoder.new_cache(2 * context + num_steps + 2)
        prepared = self.model.prepare_ids(np.random.default_rng(0).integers(256, 10_000, context))
        embeds_SD = self.model.embed(prepared)
        for _ in range(2):
            cache.reset()
            decoder.prefill(embeds_SD, prepared.position_ids, cache)
        for _ in range(2 + num_steps):
            decoder.step(embeds_SD[0], cache.length, cache)
        events = self._events(session)
        return _summed(events, 1, 1), _summed(events, 4, num_steps)

    def _open(self, role: str) -> GraphSession:
        path = self.model.package.graph_path(role, self.model.variant.name)
        return open_session(path, profile=self._folder / role)

    def _finish(self, session: GraphSession, skip: int, runs: int) -> list[OperatorTime]:
        return _summed(self._events(session), skip, runs)

    def _events(self, session: GraphSession) -> list[dict[str, Any]]:
        file = Path(session.raw.end_profiling())
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        os.unlink(file)
        return events


def _summed(events: list[dict[str, Any]], skip: int, runs: int) -> list[OperatorTime]:
    """Operators of `runs` runs of the session, after the first `skip`; the slowest first."""
    starts = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == "model_run")
    begin, end = starts[skip][0], starts[skip + runs - 1][1]
    nodes = [event for event in events if event["cat"] == "Node" and begin <= event["ts"] < end and "args" in event]
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for operator, own in self_times(nodes):
        seconds[operator] += own / 1e6 / runs
        calls[operator] += 1
    total = sum(seconds.values())
    ordered = sorted(seconds, key=lambda operator: -seconds[operator])
    return [OperatorTime(name, seconds[name], seconds[name] / total, calls[name] / runs) for name in ordered]


def self_times(nodes: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(operator, microseconds) of each event, without the events inside it. Nodes run one after the other."""
    ordered = sorted(
        (event for event in nodes if event["name"].endswith("_kernel_time")),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    times = [float(event["dur"]) for event in ordered]
    open_events: list[int] = []
    for index, event in enumerate(ordered):
        while open_events and event["ts"] >= ordered[open_events[-1]]["ts"] + ordered[open_events[-1]]["dur"]:
            open_events.pop()
        if open_events:
            times[open_events[-1]] -= event["dur"]
        open_events.append(index)
    return [(event["args"]["op_name"], max(own, 0.0)) for event, own in zip(ordered, times, strict=True)]
