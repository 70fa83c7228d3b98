"""The roles of a family in eager PyTorch, from a sample's pixels to its logits, with weights that can be lowered.

Dims: A rows that say an answer, V vocabulary, N rows and K columns of a weight, B blocks of a row, S columns a block.

Weights are mapped from one file: the system keeps in memory what there is room for.
"""

import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from ..quant.convert import stands_for
from ..quant.data_file import check_space
from ..quant.found import FoundCodes
from ..quant.recipe import Target, WeightFormat
from ..quant.source import WeightSource
from ..runtime.errors import RecipeError
from .calibrate import OpenRole, read_rows
from .family import RoleSpec
from .feeds import SampleFeeds
from .layers import Linear
from .weight_groups import Key

__all__ = ["Answers", "FloatRoles"]

_CHUNK_BYTES = 64 << 20
_SMALLEST = 1e-30


class FloatRoles:
    """Every role of a package on the samples of a folder.

    Raises RecipeError where the last role gives no logits, CapacityError where the disk cannot take the weights.
    """

    def __init__(
        self,
        feeds: SampleFeeds,
        roles: Mapping[str, RoleSpec],
        open_role: OpenRole,
        target: Target,
        folder: Path,
        codes_of: Callable[[Key], FoundCodes | None] = lambda _: None,
    ) -> None:
        """`folder` takes the files of weights, 4 bytes a parameter; `codes_of` gives codes found for a weight."""
        self.feeds, self._roles, self._codes_of = feeds, roles, codes_of
        self._scale_dtype = "float32" if target == "cpu" else "float16"
        self._rounds_inputs = target == "cpu"  # kernels of cuda compute in float16
        if roles[list(roles)[-1]].outputs[0].name != "logits":
            raise RecipeError("recipe int4-mixed: this package gives no logits to measure bits by; use int8")
        self.graphs: dict[str, ir.Model] = {}
        self.sources: dict[str, WeightSource] = {}
        self.modules: dict[str, nn.Module] = {}
        self.float16_overflows: set[Key] = set()  # weights that have values beyond float16
        self._blocks: dict[Key, int] = {}  # of linears whose inputs are rounded to 8 bits, by their weight
        for name, role in roles.items():
            self.graphs[name], self.sources[name] = open_role(name)
            with torch.device("meta"):
                self.modules[name] = role.build().eval()
            self._fill(name, folder / f"{name}.weights")

    @torch.inference_mode()
    def logits(self, sample: int, known: dict[str, torch.Tensor], first: str) -> torch.Tensor:
        """Logits [A, V] float32 of a sample through the roles from `first` on; adds to `known` what each gives."""
        names = list(self._roles)
        for name in names[names.index(first) :]:
            if not self.feeds.takes(name, known):
                continue
            arguments, _ = self.feeds.feed(name, sample, known)
            self.feeds.keep(name, known, self.modules[name](*arguments))
        logits = known["logits"]
        return logits.reshape(-1, logits.shape[-1])[-self.feeds.num_answer_rows(sample) :]

    @contextmanager
    def lowered(self, formats: Mapping[Key, WeightFormat]) -> Generator[None]:
        """Within it, weights are what their formats make of them, and inputs are rounded where kernels do."""
        try:
            for key, format in formats.items():
                self._set(key, format)
            yield
        finally:
            for key in formats:
                self._set(key, None)

    def _fill(self, role: str, path: Path) -> None:
        module = self.modules[role]
        sizes = {name: values.numel() for name, values in module.named_parameters()}
        num_values = max(1, sum(sizes.values()))
        check_space(path, 4 * num_values)  # a mapped page that finds no room ends the process
        flat = torch.from_numpy(np.memmap(path, np.float32, "w+", shape=(num_values,)))
        end = 0
        for owner_name, owner in list(module.named_modules()):
            for name, values in list(owner.named_parameters(recurse=False)):
                start, end = end, end + values.numel()
                mapped = flat[start:end].view(values.shape)
                setattr(owner, name, nn.Parameter(mapped, requires_grad=False))
                key = (role, f"{owner_name}.{name}" if owner_name else name)
                self._set(key, None)
                if float(mapped.abs().max()) > torch.finfo(torch.float16).max:
                    self.float16_overflows.add(key)
                if isinstance(owner, Linear) and name == "weight":
                    owner.register_forward_pre_hook(functools.partial(self._round_input, key))

    def _set(self, key: Key, format: WeightFormat | None) -> None:
        """Puts the values of a weight in their place: those of the checkpoint, or what a format makes of them."""
        role, name = key
        codes = self._codes_of(key)
        values = self.modules[role].get_parameter(name)
        step = max(1, _CHUNK_BYTES * len(values) // max(1, 4 * values.numel()))
        for start in range(0, len(values), step):
            stop = min(start + step, len(values))
            if codes is not None and codes.format == format:
                rows = codes.values(start, stop, values.shape[1])
            else:
                rows = read_rows(self.graphs[role].graph, self.sources[role], name, start, stop)
                rows = rows if format is None else stands_for(rows, format, self._scale_dtype, name)
            values.data[start:stop] = torch.from_numpy(np.ascontiguousarray(rows))
        if self._rounds_inputs and format is not None and format.has_blocks and format.accuracy_level == 4:
            self._blocks[key] = format.block_size
        else:
            self._blocks.pop(key, None)

    def _round_input(self, key: Key, _: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        """Accuracy level 4 of MatMulNBits: a scale for each block of each row, codes from -127 to 127."""
        size = self._blocks.get(key)
        if size is None:
            return None
        x = inputs[0]
        missing = -x.shape[-1] % size
        x_BS = nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, size))
        largest_B1 = x_BS.abs().amax(-1, keepdim=True)
        codes_BS = torch.round(x_BS * (127 / largest_B1.clamp(min=_SMALLEST)))  # as the kernel has it, to the last bit
        rounded = codes_BS * (largest_B1 / 127)
        return (rounded.flatten(-2)[..., : x.shape[-1]],)


class Answers:
    """The float answers of some samples, to compare lowered ones with: KL(float || lowered) in nats by row."""

    def __init__(self, roles: FloatRoles, samples: Iterable[int]) -> None:
        self._roles = roles
        self._known: dict[int, dict[str, torch.Tensor]] = {}
        self._log_p: dict[int, torch.Tensor] = {}
        first = next(iter(roles.modules))
        for sample in samples:
            known = roles.feeds.start(sample)
            self._log_p[sample] = roles.logits(sample, known, first).float().log_softmax(-1)
            known.pop("logits")
            self._known[sample] = known

    @property
    def num_rows(self) -> int:
        return sum(len(log_p) for log_p in self._log_p.values())

    def losses(self, first: str) -> list[torch.Tensor]:
        """KL of each row [A] float64 by sample, with the weights as they are now; none before `first` is lowered."""
        found: list[torch.Tensor] = []
        for sample, log_p in self._log_p.items():
            log_q = self._roles.logits(sample, dict(self._known[sample]), first).float().log_softmax(-1)
            exact = log_p.double()
            found.append((exact.exp() * (exact - log_q.double())).sum(-1).clamp_(min=0))
        return found
