"""What a recipe is: rules that say, as data, how each weight is stored.

A rule matches "role/parameter.name" by a glob and the first match wins. Rules reach the weights of linears and
embedding tables only; every other initializer, and a weight that no rule matches, stays in the dtype that the graph
computes in.
"""

import json
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ..runtime.errors import RecipeError
from ..runtime.manifest import ROLES
from ..runtime.schema import SchemaError, from_json

__all__ = [
    "BUILTIN_NAMES",
    "CALIBRATED_METHODS",
    "METHODS",
    "MIXED_NAME",
    "TABLE_ROLE",
    "CacheFormat",
    "RangeGuard",
    "Recipe",
    "Rule",
    "Target",
    "WeightFormat",
    "file_stem",
    "load_recipe",
    "name_with_method",
    "precision_label",
    "rules_about",
    "with_cache",
    "with_guard",
    "with_method",
]

METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")
CALIBRATED_METHODS = ("awq", "gptq", "awq+gptq")  # those that look at activations
BUILTIN_NAMES = ("fp32", "fp16", "int8", "int4", "nf4", "int2", "int8-dynamic")
MIXED_NAME = "int4-mixed"  # its rules follow from measurements (export/mixed.py): one for every weight
Target = Literal["cpu", "cuda"]  # what a package's graphs were lowered for
_BLOCK_SIZES = (16, 32, 64, 128, 256)  # what com.microsoft.MatMulNBits takes
_BLOCK_SIZES_OF_2_BITS = (32, 64, 128)  # of the others it computes 50 times slower
_DEFAULT_BLOCK = 32
_TABLE_BLOCK = 64  # of nf4, as bitsandbytes has it
TABLE_ROLE = "embed_tokens"  # the role whose table a tied head is
_TABLE_AND_HEAD = ("embed_tokens/*.weight", "decoder/lm_head.weight")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")  # part of file names; lower case, as some disks ignore case


@dataclass(frozen=True)
class WeightFormat:
    """How the values of a weight are stored.

    bits 32 and 16 are floats. bits 8, 4 and 2 are unsigned codes in blocks of `block_size` values along a row, each
    block with a scale of its own and, unless symmetric, a zero point. `accuracy_level` goes to MatMulNBits: 0 computes
    in the dtype of the activations, 1 in float32, 4 with 8-bit activations. `method` finds the codes: "rtn"
    (quant/rtn.py) and "hqq" (quant/hqq.py) look at the weight alone, "awq", "gptq" and "awq+gptq" at activations too
    (quant/calibrate.py).

    activations "int8-dynamic" is for linears of the cpu target: bits 8, signed codes with a scale a channel, multiplied
    in integers with activations that are rounded to 8 bits with a scale a token (quant/dynamic.py). It has no blocks.

    `balance` is for linears of the cpu target whose activations are rounded to 8 bits: by "int8-dynamic", or by blocks
    at accuracy_level 4. What makes some channels of their input large moves into their weights (quant/balance.py).

    values "nf4" and "fp4" are for linears: bits 4, codes of a table with the largest value of a block of the flattened
    weight as its scale (quant/nf4.py), multiplied in the dtype of the activations.
    """

    bits: int
    block_size: int = _DEFAULT_BLOCK
    symmetric: bool = False
    accuracy_level: int = 4
    method: str = "rtn"
    activations: Literal["float", "int8-dynamic"] = "float"
    balance: bool = False
    values: Literal["integer", "nf4", "fp4"] = "integer"

    def __post_init__(self) -> None:
        if self.bits not in (32, 16, 8, 4, 2):
            raise RecipeError(f"bits {self.bits}: use 32, 16, 8, 4 or 2")
        if self.method not in METHODS:
            raise RecipeError(f"method {self.method!r} is unknown; known methods are {', '.join(METHODS)}")
        if self.activations == "int8-dynamic" and self.bits != 8:
            raise RecipeError(f"activations int8-dynamic with bits {self.bits}: use bits 8")
        if self.balance and not (self.is_dynamic or (self.has_blocks and self.accuracy_level == 4)):
            raise RecipeError(
                "balance true: it is for rounded activations; leave it out, or use accuracy_level 4 with blocks, "
                "or activations int8-dynamic"
            )
        if self.is_table:
            self._check_table()
        elif not self.has_blocks:
            if (self.block_size, self.symmetric, self.accuracy_level, self.method) != (_DEFAULT_BLOCK, False, 4, "rtn"):
                what = "with activations int8-dynamic" if self.is_dynamic else "is a float and"
                raise RecipeError(
                    f"bits {self.bits} {what} has no block_size, symmetric, accuracy_level or method: leave them out"
                )
        else:
            self._check_blocks()

    def _check_table(self) -> None:
        others = (self.symmetric, self.accuracy_level, self.method, self.activations)
        if self.bits != 4 or others != (False, 4, "rtn", "float"):
            raise RecipeError(
                f"values {self.values}: takes bits 4 and a block_size, and no symmetric, accuracy_level, method or "
                "activations: leave them out"
            )
        if self.block_size < _BLOCK_SIZES[0] or self.block_size & (self.block_size - 1):
            raise RecipeError(f"block_size {self.block_size} with values {self.values}: use a power of two from 16 on")

    def _check_blocks(self) -> None:
        if self.block_size not in _BLOCK_SIZES:
            raise RecipeError(f"block_size {self.block_size}: use one of {', '.join(map(str, _BLOCK_SIZES))}")
        if self.bits == 2 and self.block_size not in _BLOCK_SIZES_OF_2_BITS:
            sizes = ", ".join(map(str, _BLOCK_SIZES_OF_2_BITS))
            raise RecipeError(
                f"block_size {self.block_size} with bits 2: use one of {sizes}; ONNX Runtime has no kernel for others"
            )
        if self.accuracy_level not in (0, 1, 4):
            raise RecipeError(f"accuracy_level {self.accuracy_level}: use 0, 1 or 4 (8-bit activations)")
        if self.bits in (8, 2) and self.accuracy_level != 4:
            raise RecipeError(
                f"accuracy_level {self.accuracy_level} with bits {self.bits}: use 4; ONNX Runtime has no kernel for "
                f"{self.bits}-bit blocks without it and falls back to one that is tens of times slower"
            )

    @property
    def is_quantized(self) -> bool:
        """True for codes with scales, False for floats."""
        return self.bits < 16

    @property
    def has_blocks(self) -> bool:
        """True for codes in blocks: what MatMulNBits and GatherBlockQuantized read."""
        return self.is_quantized and not self.is_dynamic and not self.is_table

    @property
    def is_table(self) -> bool:
        """True for codes of a table: what MatMulBnb4 reads."""
        return self.values != "integer"

    @property
    def is_calibrated(self) -> bool:
        """True where the codes depend on activations, so that calibration data are needed."""
        return self.method in CALIBRATED_METHODS

    @property
    def is_dynamic(self) -> bool:
        """True where activations are rounded to 8 bits too, with a scale a token."""
        return self.activations == "int8-dynamic"

    @property
    def stored(self) -> "WeightFormat | None":
        """What of it makes the bytes of a weight: neither how it is computed with nor its factors; None of floats."""
        return replace(self, accuracy_level=4, balance=False) if self.is_quantized else None

    @property
    def label(self) -> str:
        """Short name for people: "float32", "float16", "int8", "int8-dynamic", "int4", "nf4"."""
        if self.is_dynamic:
            return self.activations
        if self.is_table:
            return self.values
        return f"int{self.bits}" if self.is_quantized else f"float{self.bits}"


@dataclass(frozen=True)
class Rule:
    """`match` is "<role glob>/<parameter glob>", as in "decoder/layers.*.mlp.*.weight".

    A rule with a `target` is there for packages of that target alone: kernels differ between them.
    """

    match: str
    format: WeightFormat
    target: Target | None = None

    def __post_init__(self) -> None:
        role_glob, slash, parameter_glob = self.match.partition("/")
        if not slash or not parameter_glob or "/" in parameter_glob:
            raise RecipeError(f"match {self.match!r} is not of the form role/parameter, as decoder/lm_head.weight is")
        if not any(fnmatchcase(role, role_glob) for role in ROLES):
            raise RecipeError(f"match {self.match!r}: no role is called {role_glob!r}; roles are {', '.join(ROLES)}")

    @property
    def role_glob(self) -> str:
        return self.match.partition("/")[0]

    @property
    def parameter_glob(self) -> str:
        return self.match.partition("/")[2]

    def reaches(self, match: str) -> bool:
        """True where the rule covers what `match`, of another rule, names exactly or by a narrower glob."""
        return self.match != match and fnmatchcase(match, self.match)

    def covers(self, role: str, parameter: str, target: Target) -> bool:
        """True where the rule is about this parameter. Capitals count, on every system."""
        is_for = self.target in (None, target)
        return is_for and fnmatchcase(role, self.role_glob) and fnmatchcase(parameter, self.parameter_glob)


@dataclass(frozen=True)
class CacheFormat:
    """How the decoder's key/value cache is held: codes with a scale of a channel or of a tensor (quant/kv_cache.py)."""

    bits: Literal[8] = 8
    scales: Literal["channel", "tensor"] = "channel"


@dataclass(frozen=True)
class RangeGuard:
    """Where a graph computes in float16: what comes near its end on calibration data stays float32 (quant/guard.py).

    "Near" is the end divided by `margin`: other data may give larger values than those that were seen.
    """

    margin: float = 4.0

    def __post_init__(self) -> None:
        if not 1 <= self.margin <= 1024:
            raise RecipeError(f"range_guard: margin {self.margin}: use 1 to 1024; 4 is the default")


@dataclass(frozen=True)
class Recipe:
    """A named list of rules. The names of the builtin recipes mean the builtin rules and nothing else."""

    name: str
    rules: tuple[Rule, ...]
    cache: CacheFormat | None = None  # None: in the dtype that the graph computes in
    range_guard: RangeGuard | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RecipeError(f"recipe name {self.name!r}: use a-z, 0-9, '_', '.', '-' (64 at most)")
        if not self.rules:
            raise RecipeError(f"recipe {self.name}: rules is empty")
        builtin = _builtin_rules(self.name)
        if builtin is not None and (builtin != self.rules or self.cache is not None or self.range_guard is not None):
            raise RecipeError(f"recipe {self.name}: this builtin recipe has other rules; choose another name")

    def is_calibrated(self, role: str | None = None, target: Target = "cpu") -> bool:
        """True where the cache, the guard, or a rule that can reach the role, or any, needs calibration data."""
        # A table holds what the checkpoint has, whatever it is asked: nothing to guard.
        if self.is_guarded(target) and role != TABLE_ROLE:
            return True
        return (self.cache is not None and role in (None, "decoder")) or any(
            rule.format.is_calibrated
            and rule.target in (None, target)
            and (role is None or fnmatchcase(role, rule.role_glob))
            for rule in self.rules
        )

    def is_guarded(self, target: Target) -> bool:
        """True where ranges are watched: the cpu target computes in float32, which has room for all."""
        return self.range_guard is not None and target == "cuda"

    def format_of(self, role: str, parameter: str, target: Target = "cpu") -> WeightFormat | None:
        """The format of a weight, or None where no rule covers it."""
        return next((rule.format for rule in self.rules if rule.covers(role, parameter, target)), None)


def load_recipe(name: str, *, block_size: int | None = None, method: str | None = None) -> Recipe:
    """A builtin recipe by name, or one from a JSON file `{"name": ..., "rules": [{"match": ..., "format": {...}}]}`.

    `block_size` makes a variation of a builtin one: "int4" with 128 is "int4_b128", whose 8-bit parts stay as in "int4"
    so that the two share files; fp32 and fp16 have no blocks and stay what they are. `method`: see `with_method`.
    Raises RecipeError with the file, the field and the fix.
    """
    if method is not None and method not in METHODS:
        raise RecipeError(f"method {method!r} is unknown; known methods are {', '.join(METHODS)}")
    if block_size is not None and block_size not in _BLOCK_SIZES:
        raise RecipeError(f"block size {block_size}: use one of {', '.join(map(str, _BLOCK_SIZES))}")
    if block_size is not None and name not in BUILTIN_NAMES:
        raise RecipeError(f"block size {block_size} with recipe {name!r}: its rules say the block sizes; leave it out")
    if block_size is not None and name.startswith("int"):
        name = _block_name(name, block_size)
    builtin = _builtin_rules(name)
    if builtin is not None:
        return with_method(Recipe(name, builtin), method)
    if name.endswith(".json") or "/" in name:
        return with_method(_read_recipe(Path(name)), method)
    raise RecipeError(f"recipe {name!r} is unknown; known are {', '.join(BUILTIN_NAMES)}; or give a path to a .json")


def with_method(recipe: Recipe, method: str | None) -> Recipe:
    """The recipe with another method for the rules with the fewest bits: "int4" with "awq" is "int4_awq".

    Tables and the head, which may be the table again, stay as they are. None and "rtn" change no recipe of rtn alone;
    nor is there anything to change in one without blocks. Raises RecipeError on an unknown method.
    """
    if method is None:
        return recipe
    if method not in METHODS:
        raise RecipeError(f"method {method!r} is unknown; known methods are {', '.join(METHODS)}")
    bits = min((rule.format.bits for rule in recipe.rules if rule.format.is_quantized), default=0)
    rules: list[Rule] = []
    for rule in recipe.rules:
        if rule.format.bits != bits or not rule.format.has_blocks or rule.format.method == method:
            rules.append(rule)
            continue
        kept = [match for match in _TABLE_AND_HEAD if rule.reaches(match)]
        if rule.match not in _TABLE_AND_HEAD:
            rules += [replace(rule, match=match) for match in kept]
            rules.append(replace(rule, format=replace(rule.format, method=method)))
        else:
            rules.append(rule)
    if tuple(rules) == recipe.rules:
        return recipe
    return replace(recipe, name=name_with_method(recipe.name, method), rules=tuple(rules))


def name_with_method(name: str, method: str) -> str:
    """What a variant of a recipe is called by whose codes another method than rounding finds: "int4_awq-gptq"."""
    return f"{name}_{method.replace('+', '-')}"


def with_cache(recipe: Recipe, scales: Literal["channel", "tensor"] | None) -> Recipe:
    """The recipe with a cache in 8 bits: "int4" is then "int4_kv8", or "int4_kv8t" with scales of a tensor."""
    if scales is None:
        return recipe
    return replace(recipe, name=f"{recipe.name}_kv8{'t' * (scales == 'tensor')}", cache=CacheFormat(8, scales))


def with_guard(recipe: Recipe) -> Recipe:
    """The recipe with a guard against what float16 cannot take: "fp16" is then "fp16_guarded"."""
    if recipe.range_guard is not None:
        return recipe
    return replace(recipe, name=f"{recipe.name}_guarded", range_guard=RangeGuard())


def precision_label(recipe: Recipe, role: str, target: Target = "cpu") -> str:
    """What the files of a role are called by. Equal labels mean equal content, so variants share files by it.

    It is the name of the builtin recipe that says the same about this role, else the recipe's own name: also wherever
    codes depend on activations, which are those of this recipe.
    """
    if recipe.is_calibrated(role, target):
        return recipe.name
    said = rules_about(recipe.rules, role, target)
    for base in BUILTIN_NAMES:
        for block_size in (_DEFAULT_BLOCK, *(_BLOCK_SIZES if base.startswith("int") else ())):
            label = _block_name(base, block_size)
            if rules_about(_builtin_rules(label) or (), role, target) == said:
                return label
    return recipe.name


def file_stem(role: str, label: str) -> str:
    """Name of the files of a role without their endings: "decoder" in float32, else "decoder_int4" and the like."""
    return role if label == "fp32" else f"{role}_{label}"


def rules_about(rules: tuple[Rule, ...], role: str, target: Target) -> tuple[tuple[str, WeightFormat], ...]:
    """The rules that can reach a role, without the role and without repetitions that an earlier rule hides."""
    said: dict[str, WeightFormat] = {}
    for rule in rules:
        if rule.target in (None, target) and fnmatchcase(role, rule.role_glob):
            said.setdefault(rule.parameter_glob, rule.format)
    return tuple(said.items())


def _block_name(base: str, block_size: int) -> str:
    return base if block_size == _DEFAULT_BLOCK else f"{base}_b{block_size}"


def _builtin_rules(name: str) -> tuple[Rule, ...] | None:
    """The rules behind a builtin name ("int4", "int4_b128"), or None for any other name."""
    base, _, block = name.partition("_b")
    if base not in BUILTIN_NAMES or name not in {base, *(_block_name(base, size) for size in _BLOCK_SIZES)}:
        return None
    if base in ("fp32", "fp16"):
        return None if block else (Rule("*/*.weight", WeightFormat(bits=int(base[2:]))),)
    int8, head = WeightFormat(bits=8), Rule("decoder/lm_head.weight", WeightFormat(bits=8, balance=True))
    dynamic = WeightFormat(bits=8, activations="int8-dynamic", balance=True)
    block_size = int(block) if block else _DEFAULT_BLOCK
    blocks = WeightFormat(bits=8, block_size=block_size)
    # Towers are most of the time to the first token on a CPU, and take rounded activations well.
    towers = tuple(Rule(f"{role}/*.weight", dynamic, target="cpu") for role in ("vision_encoder", "projector"))
    if base == "int8":
        return (*towers, Rule("decoder/*.weight", replace(blocks, balance=True)), Rule("*/*.weight", blocks))
    if base == "int8-dynamic":
        return (Rule("embed_tokens/*.weight", blocks), Rule("*/*.weight", dynamic))
    if base == "nf4":
        table = WeightFormat(bits=4, block_size=_TABLE_BLOCK, values="nf4")
        return None if block else (*towers, head, Rule("decoder/*.weight", table), Rule("*/*.weight", int8))
    if base == "int2" and block_size not in _BLOCK_SIZES_OF_2_BITS:
        return None
    return (
        *towers,
        head,  # its errors go straight into the logits
        Rule("decoder/*.weight", WeightFormat(bits=int(base[3:]), block_size=block_size, balance=True)),
        Rule("*/*.weight", int8),
    )


def _read_recipe(path: Path) -> Recipe:
    try:
        return from_json(Recipe, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file; builtin recipes are {', '.join(BUILTIN_NAMES)}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (SchemaError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: {error}") from error
