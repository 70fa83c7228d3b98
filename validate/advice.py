"""What a failed report advises, from its JSON: limits broken, by how much, and the layers to raise."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["broken_gates", "layers_to_raise", "raising"]

_NUM_RAISES = 3  # told; the JSON has all that were measured


def broken_gates(variant: Mapping[str, Any]) -> list[str]:
    """One text a broken limit of a variant: stage, metric, value, limit, and how far beyond it the value is."""
    broken = [gate for row in variant["rows"] for gate in row["gates"] if gate["outcome"] != "PASS"]
    if not broken and variant["outcome"] == "FAIL":
        return ["nothing that the graphs compute was judged"]
    return [_broken(gate) for gate in broken]


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


def raising(variant: Mapping[str, Any]) -> str:
    """One sentence on what to raise; empty for a variant that has not failed, or of which nothing is known.

    Layers whose gain is measured come with it, those whose interval reaches 0 do not come. Without a measurement it is
    the growth of their error.
    """
    if variant["outcome"] != "FAIL":
        return ""
    measured = variant.get("raises") or ()
    if measured:
        sure = [each for each in measured if float(each["ci_low"]) > 0][:_NUM_RAISES]
        if not sure:
            return f"No single layer of {len(measured)} that were raised to floats gained anything for sure."
        gains = [f"{each['stage']} ({each['gain'] / each['before']:.0%})" for each in sure]
        return f"Raise {', '.join(gains)} first: so much of the mean KL goes with that layer in floats."
    names = layers_to_raise(variant)
    return f"Raise the precision of {', '.join(names)} first: their error grows most." if names else ""


def _broken(gate: Mapping[str, Any]) -> str:
    where = f"{gate['stage']} {gate['metric']}"
    if gate["value"] is None:
        return f"{where} was not measured"
    value, limit = float(gate["value"]), float(gate["limit"])
    side = "above" if value > limit else "below"
    text = f"{where} is {value:.4g}, {abs(value - limit):.3g} {side} the limit of {limit:g}"
    if gate.get("interval"):
        low, high = map(float, gate["interval"])
        if low <= limit <= high:
            text += f", which its interval {low:.4g} to {high:.4g} reaches: more items would tell"
    return text
