"""The decoder graph on right-padded batches: each row as if it were alone, which serving several prompts rests on.

B rows   S tokens of the longest   C length of the shared cache   D hidden size
"""

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_families import lowered, role_of, torch_module, with_values

from vlmport.export.family import families, load_family
from vlmport.runtime.routing import routing_inputs

DECODERS = [name for name in families() if "decoder" in load_family(name).roles(load_family(name).tiny_config)]
LENGTHS = (5, 3, 1)
CACHE = 9


class Graph:
    """A decoder session on caches of fixed length, which it writes in place."""

    def __init__(self, family: str) -> None:
        model = with_values(lowered(family, "decoder", "cpu"), torch_module(role_of(family, "decoder")))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = ir.serde.serialize_model(model).SerializeToString()
        self.session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self.shapes = {item.name: item.shape for item in self.session.get_inputs()}
        self.width = self.shapes["inputs_embeds"][-1]

    def caches(self, num_rows: int) -> dict[str, np.ndarray]:
        past = {name: shape for name, shape in self.shapes.items() if name.startswith("past_key_values.")}
        return {name: np.zeros((num_rows, shape[1], CACHE, shape[3]), np.float32) for name, shape in past.items()}

    def run(
        self, embeds_BSD: np.ndarray, mask: np.ndarray, starts: list[int], caches: dict[str, np.ndarray]
    ) -> np.ndarray:
        """Logits [B, S, V] of all positions; row i continues at position starts[i]."""
        num_rows, num_new, _ = embeds_BSD.shape
        rows = np.array(starts)[:, None] + np.arange(num_new)
        axes = self.shapes["position_ids"][:-2]  # 3 of them, or none
        feeds: dict[str, Any] = {
            "inputs_embeds": embeds_BSD,
            "attention_mask": mask,
            "position_ids": np.broadcast_to(rows, (*axes, num_rows, num_new)).astype(np.int64),
            "num_logits_to_keep": np.array([0]),
        }
        if "text_rows" in self.shapes:  # of all rows of the batch, one after the other
            routed = routing_inputs(np.zeros(num_rows * num_new, bool))
            feeds |= routed | {"row_places": routed["row_places"].reshape(num_rows, num_new)}
        binding, held = self.session.io_binding(), []
        for name, array in (feeds | caches).items():
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array) if name in feeds else array)
            held.append(value)
            binding.bind_ortvalue_input(name, value)
            if name in caches:
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        logits = binding.get_outputs()[-1].numpy()
        assert logits.shape[:2] == (num_rows, num_new)
        return logits


@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_a_padded_batch_are_as_if_alone(name: str) -> None:
    graph = Graph(name)
    generator = np.random.default_rng(3)
    prompts = [generator.standard_normal((1, length, graph.width), dtype=np.float32) for length in LENGTHS]
    following = generator.standard_normal((len(LENGTHS), 1, graph.width), dtype=np.float32)
    alone = []
    for row, (length, prompt) in enumerate(zip(LENGTHS, prompts, strict=True)):
        caches = graph.caches(1)
        first = graph.run(prompt, np.ones((1, length), np.int64), [0], caches)
        second = graph.run(following[row : row + 1], np.ones((1, length + 1), np.int64), [length], caches)
        alone.append((first[0], second[0]))

    longest, num_rows = max(LENGTHS), len(LENGTHS)
    embeds = np.zeros((num_rows, longest, graph.width), np.float32)
    mask = np.arange(longest + 1) < np.array(LENGTHS)[:, None]
    for row, prompt in enumerate(prompts):
        embeds[row, : LENGTHS[row]] = prompt[0]
    caches = graph.caches(num_rows)
    first = graph.run(embeds, mask[:, :longest].astype(np.int64), [0] * num_rows, caches)
    grown = (np.arange(longest + 1) <= np.array(LENGTHS)[:, None]).astype(np.int64)
    second = graph.run(following, grown, list(LENGTHS), caches)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(first[row, :length], alone[row][0], atol=1e-5)
        np.testing.assert_allclose(second[row], alone[row][1], atol=1e-5)
