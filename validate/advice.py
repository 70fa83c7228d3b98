"""What a failed report advises, from its JSON: limits broken, by how much, and the layers to raise."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["broken_gates", "layers_to_raise"]


def broken_gates(variant: Mapping[str, Any]) -> list[str]:
    """One text a broken limit of a variant: stage, metric, value, limit, and how far beyond it the value is."""
    return [_broken(gate) for row in variant["rows"] for gate in row["gates"] if gate["outcome"] != "PASS"]


def layers_to_raise(variant: Mapping[str, Any], num: int = 3) -> list[str]:
    """The stages whose error grows most over the one before, largest first.

    Errors of independent steps add up in squares, so growth is the difference of squared relative L2 errors.
    """
    grown: list[tuple[float, str]] = []
    before = 0.0
    for layer in variant.get("layers") or ():
        error = float(layer["relative_l2"])
        if not math.isfinite(error):
            return [layer["stage"]]
        if layer["layer"] is not None:
            grown.append((error**2 - before**2, layer["stage"]))
        before = error
    return [stage for growth, stage in sorted(grown, reverse=True)[:num] if growth > 0]


def _broken(gate: Mapping[str, Any]) -> str:
    where = f"{gate['stage']} {gate['metric']}"
    if gate["value"] is None:
        return f"{where} was not measured"
    value, limit = float(gate["value"]), float(gate["limit"])
    side = "above" if value > limit else "below"
    text = f"{where} is {value:.4g}, {abs(value - limit):.3g} {side} the limit of {limit:g}"
    if gate["outcome"] == "AMBIGUOUS" and gate.get("interval"):
        low, high = gate["interval"]
        text += f", which its interval {low:.4g} to {high:.4g} reaches: more items would tell"
    return text
