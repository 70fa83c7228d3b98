"""A report's JSON with every part that the page draws: the real writer's where it can be, made-up numbers else."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from vlmport.validate.intervals import ratio
from vlmport.validate.metrics import LogitErrors
from vlmport.validate.report import plain
from vlmport.validate.statistics import AnswerEvidence, summarize

ANSWERS = (("12.50", "12.50", "12.50"), ("a & <b>", "a & <b>", "a & <i>"), ("leeks", "leeks", "peas"))
_STEPS = ("preprocessing", "export", "weights:decoder", "kv_cache")


def kl(mean):
    """One KlSummary as JSON."""
    spread = {"ci_low": mean * 0.8, "ci_high": mean * 1.2, "median": mean / 2, "p99": mean * 5, "p999": mean * 8}
    shares = {"max": mean * 9, "same_top1": 0.99, "top5": 1.0, "delta_p_rms": 0.01}
    return {"num_positions": 40, "num_samples": 3, "mean": mean, **spread, **shares}


def variant(name, scale, outcome="PASS"):
    """One variant whose divergence is about `scale` nats."""
    random = np.random.default_rng(3)
    answers = [dict(zip(("expected", "reference", "answer"), texts, strict=True)) for texts in ANSWERS]
    for number, answer in enumerate(answers):
        answer |= {"id": f"i{number}", "kind": "total", "image": f"{number}.png", "question": "How much <is> it?"}
        answer |= {"right": answer["answer"] == answer["expected"], "reference_right": True}
    right = np.array([answer["right"] for answer in answers], float)
    gate = {
        "stage": "answers",
        "column": name,
        "metric": "recovery",
        "limit": 0.99,
        "value": 0.667,
        "would_pass": 0.667,
    }
    row = {"stage": "answers", "kind": "task", "column": name, "num_samples": 3, "values": {"recovery": 0.667}}
    row |= {"worst_sample": "i1", "notes": [], "outcome": outcome, "gates": [gate | {"outcome": outcome}]}
    share = float(right.mean())
    task = {"task": "t", "num_items": 3, "scorer": "exact_match", "score": share, "by_kind": {"total": share}}
    task |= {"num_lost": 2, "num_gained": 0, "flips": 2 / 3, "num_changed": 2, "tokens_per_second": 12.0}
    task |= {"reference_score": 1.0, "recovery": 0.667, "changed": 2 / 3, "answers": answers}
    task["intervals"] = {key: plain(ratio(right, np.ones(3))) for key in ("score", "flips")}
    layers = [
        {"role": "decoder", "layer": layer, "stage": f"decoder.layers.{layer}", "order": layer, "num_samples": 3}
        | {"relative_l2": scale**0.5 * 2**layer, "snr_db": 30.0, "cosine_min": 0.99, "max_abs": 0.1}
        for layer in range(3)
    ]
    steps = [
        {"name": step, "about": f"swaps {step}", "role": None, "cumulative": kl(scale), "alone": kl(scale)}
        | {"added": {"mean": scale, "ci_low": scale / 2, "ci_high": scale * 2}}
        | {"skipped": "no 8-bit cache" if step == "kv_cache" else None}
        for step in _STEPS
    ]
    return {
        "name": name,
        "outcome": outcome,
        "precisions": {"decoder": name},
        "size": 1_000_000,
        "rows": [row],
        "not_compared": [{"sample": "i0", "stage": "patch_embed", "reason": "not an output"}],
        "examples": [],
        "seconds": 1.0,
        "inputs": {"num_samples": 3, "num_equal": 3, "sha256": "ef" * 32, "different": []},
        "task": task,
        "statistics": plain(summarize([evidence(random, scale, number) for number in range(3)], 0.1, token_class)),
        "layers": layers,
        "waterfall": {"num_samples": 3, "num_positions": 40, "steps": steps},
        "bisect": None,
    }


def evidence(random, scale, number, length=6):
    """One sample; the last one's answer leaves the reference's at its fourth id."""
    given = tuple(range(length)) if number < 2 else (0, 1, 2, 99, 4, 5)
    errors = LogitErrors(
        kl=random.gamma(1, scale, length),
        same=random.random(length) < 0.9,
        margin=random.gamma(1, 1, length),
        top5=np.ones(length, bool),
        delta_p=random.normal(0, 0.01, length),
    )
    return AnswerEvidence(f"i{number}", errors, tuple(range(length)), given, num_patches=300 * number)


def token_class(token):
    return "digits" if token % 2 else "text"


def document(*variants):
    """A whole document around these variants."""
    return {
        "schema": "vlmport-report/3",
        "mode": "reference",
        "outcome": "FAIL",
        "reference": {"checkpoint": "a <checkpoint>", "code": "transformers"},
        "reference_files": {"model.safetensors": "cd" * 32},
        "task_files": {"samples.jsonl": "ef" * 32},
        "package": {"name": "receipts & <co>", "files": {"vlmport.json": "ab" * 32}},
        "provider": "CPUExecutionProvider",
        "versions": {"python": "3.11", "onnxruntime": "1.32.0"},
        "num_samples": 3,
        "samples": ["i0", "i1", "i2"],
        "inputs": {"sha256": "ef" * 32, "samples": []},
        "gates": {"origin": "built in", "tie_margin": {}, "table": {}},
        "noise": {"what": "PyTorch float32 against bfloat16", "kl": kl(3e-4)},
        "sweep": [
            {"variant": "int4", "case": "packing", "id": "8 images, shuffled", "about": "", "stage": "projector"}
            | {"metric": "max_abs", "value": 1e-6, "limit": 1e-4, "outcome": "PASS", "skipped": None}
        ],
        "variants": list(variants),
    }


# Mappings whose keys are names of things, not fields.
NAMES_OF = {
    *("reference_files", "task_files", "files", "source_files", "versions", "precisions", "by_kind", "by_class"),
    *("by_size", "tie_margin", "table", "tolerances"),
}


def field_names(value: Any, name: str = "") -> Iterator[str]:
    """Names of all fields of a JSON document."""
    if isinstance(value, list):
        for item in value:
            yield from field_names(item, name)
    if isinstance(value, dict):
        for key, item in value.items():
            if name not in NAMES_OF and not re.search(r"_ci_(low|high)$", key):
                yield key
            yield from field_names(item, "" if name in NAMES_OF else key)
