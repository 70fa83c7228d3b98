"""What `make bench-quant` compares: rows, as data in quant_rows.json, on groups of checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmport.quant.recipe import MIXED_NAME
from vlmport.runtime.errors import InputError
from vlmport.runtime.schema import from_json

__all__ = ["Group", "QuantPlan", "QuantRow", "load_plan"]

_ROWS = Path(__file__).with_name("quant_rows.json")


@dataclass(frozen=True)
class Group:
    """Rows that stand in one table: a checkpoint, by the name that quant_inputs.py makes it by."""

    name: str
    checkpoint: Literal["demo", "outliers"]
    about: str


@dataclass(frozen=True)
class QuantRow:
    """One variant. `maker` says who quantizes: this project by a recipe, or a peer by its method of that name.

    "imported" is the checkpoint that bitsandbytes has quantized, exported as it is. `recipe` may be a file in the
    folder recipes. `options` are more arguments of `vlmport quantize`; `bits` are those of a peer's decoder.
    """

    name: str
    groups: tuple[str, ...]
    maker: Literal["vlmport", "onnxruntime", "bitsandbytes", "imported"] = "vlmport"
    recipe: str = "int4"
    method: str | None = None
    options: tuple[str, ...] = ()
    bits: int = 4

    @property
    def needs_data(self) -> bool:
        """True where calibration pairs are looked at."""
        has_method = self.method is not None and self.method not in ("rtn", "hqq")
        return self.maker == "vlmport" and (has_method or self.recipe == MIXED_NAME or "--kv-cache" in self.options)


@dataclass(frozen=True)
class QuantPlan:
    groups: tuple[Group, ...]
    rows: tuple[QuantRow, ...]


def load_plan(chosen: tuple[str, ...] = (), groups: tuple[str, ...] = ()) -> QuantPlan:
    """The rows whose names begin with one of `chosen` (all without any), in these groups.

    Raises InputError for a name that nothing begins with.
    """
    plan = from_json(QuantPlan, json.loads(_ROWS.read_text(encoding="utf-8")))
    for name in chosen:
        if not any(row.name.startswith(name) for row in plan.rows):
            raise InputError(f"--rows {name}: no row begins so; rows are {', '.join(row.name for row in plan.rows)}")
    known = {group.name for group in plan.groups}
    for name in groups:
        if name not in known:
            raise InputError(f"--groups {name}: groups are {', '.join(sorted(known))}")
    rows = tuple(row for row in plan.rows if not chosen or row.name.startswith(chosen))
    return QuantPlan(tuple(group for group in plan.groups if not groups or group.name in groups), rows)
