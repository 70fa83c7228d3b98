"""Positions equal to the golden ones, in the three rules for clips, and to the rule written out token by token."""

from dataclasses import replace

import golden_cases as golden
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmport.runtime.errors import PackageError
from vlmport.runtime.manifest import PositionSpec
from vlmport.runtime.positions import VIDEO_RULES, VisualRun, positions


def runs_of(case: golden.Golden) -> list[VisualRun]:
    """Images and clips where the golden ids have them, with the golden grids."""
    config = golden.read_json(case.folder / "config.json")
    merge = config["vision_config"]["spatial_merge_size"]
    ids = case.case["input_ids"]
    parts = [part for message in case.request["messages"] for part in message["content"] if part["type"] != "text"]
    grids = {kind: iter(case.base.tensor(f"{kind}_grid_thw")) for kind in {part["type"] for part in parts}}
    depth = golden.specs(case.folder).image.temporal_patch_size
    runs, start = [], 0
    for part in parts:
        kind = part["type"]
        t, h, w = (int(n) for n in next(grids[kind]))
        start = ids.index(config[f"{kind}_token_id"], start)
        seconds = depth / part["fps"] if kind == "video" else None
        runs.append(VisualRun(kind, start, (t, h // merge, w // merge), seconds))
        start += runs[-1].length
    return runs


@pytest.fixture(params=golden.cases(), ids=str)
def case(request: pytest.FixtureRequest) -> golden.Golden:
    return request.param


def agrees(case: golden.Golden, spec: PositionSpec) -> bool:
    found = positions(spec, len(case.case["input_ids"]), runs_of(case))
    assert found.position_ids.dtype == np.int64
    expected, delta = case.tensor("position_ids"), case.tensor("extra.rope_deltas")
    assert expected is not None
    assert delta is not None
    return np.array_equal(found.position_ids, expected) and found.rope_delta == int(delta[0])


def test_golden_positions(case: golden.Golden) -> None:
    assert agrees(case, golden.specs(case.folder).positions)


@pytest.mark.parametrize(("version", "case"), golden.alternatives("mrope_transformers_"), ids=str)
def test_golden_positions_of_other_versions(version: str, case: golden.Golden) -> None:
    spec = golden.specs(case.folder).positions
    (rule,) = [rule for rule in VIDEO_RULES if f"transformers-{version}".startswith(rule)]
    assert agrees(case, replace(spec, video_rule=rule))
    assert not agrees(case, spec), "an alternative differs from the default, or it would not be one"


def test_the_other_rules_agree_where_no_alternative_is_told(case: golden.Golden) -> None:
    told = {(version, str(other)) for version, other in golden.alternatives("mrope_transformers_")}
    for rule in VIDEO_RULES:
        if not any(f"transformers-{version}".startswith(rule) and name == str(case) for version, name in told):
            assert agrees(case, replace(golden.specs(case.folder).positions, video_rule=rule))


def test_golden_positions_of_padded_rows() -> None:
    compared = 0
    for folder in golden.folders():
        document = golden.read_json(folder / "expected.json")
        by_name = {case.name: case for case in golden.cases() if case.folder == folder}
        for name, batch in document["batches"].items():
            record = golden.Golden(folder, name, batch, batch, "expected.safetensors")
            for stage, tensor in record.stages("position_ids"):
                for row, row_name in enumerate(batch["rows"]):
                    case = by_name[row_name]
                    real = np.array(batch["attention_mask"][row], bool)
                    found = positions(golden.specs(folder).positions, int(real.sum()), runs_of(case))
                    assert stage["shape"][0] == 3
                    np.testing.assert_array_equal(tensor[:, row, real], found.position_ids)
                    compared += 1
    assert compared


def token_by_token(spec: PositionSpec, num_tokens: int, runs: list[VisualRun]) -> np.ndarray:
    """The same, as the specification tells it: one token after the other."""
    rows: list[tuple[int, int, int]] = []
    current = 0
    for run in runs:
        while len(rows) < run.start:
            rows.append((current,) * 3)
            current += 1
        t, h, w = run.grid
        for ti in range(t):
            seconds = np.float32(run.seconds_per_grid or 0)
            rate = np.float32(spec.tokens_per_second)
            if spec.video_rule == "transformers-4.57":
                time = ti * int(seconds) * int(rate)
            elif spec.video_rule == "transformers-4.49":
                time = int(np.float32(np.float32(ti) * seconds) * rate)
            else:
                time = int(np.float32(ti) * np.float32(rate * seconds))
            rows += [(current + time, current + y, current + x) for y in range(h) for x in range(w)]
        if spec.video_rule == "transformers-5.23":
            current += max(h, w)
        else:
            current = max(max(row) for row in rows) + 1
    while len(rows) < num_tokens:
        rows.append((current,) * 3)
        current += 1
    return np.array(rows).reshape(-1, 3).T


side = st.integers(1, 5)
entry = st.tuples(
    st.integers(0, 4),  # text tokens before it
    st.booleans(),
    st.tuples(side, side, side),
    st.sampled_from([0.08, 0.3, 0.5, 2 / 3, 1.0, 1.2, 2.0, 7.0]),
)


@given(
    st.lists(entry, max_size=4), st.integers(0, 5), st.sampled_from(VIDEO_RULES), st.sampled_from([1.0, 2.0, 4.0, 25.0])
)
def test_runs_equal_token_by_token(entries: list, tail: int, rule: str, rate: float) -> None:
    runs: list[VisualRun] = []
    start = 0
    for text, moving, (t, h, w), seconds in entries:
        start += text
        grid = (t, h, w) if moving else (1, h, w)
        runs.append(VisualRun("video" if moving else "image", start, grid, seconds if moving else None))
        start += runs[-1].length
    num_tokens = start + tail
    spec = PositionSpec("mrope", rule, rate)
    found = positions(spec, num_tokens, runs)
    np.testing.assert_array_equal(found.position_ids, token_by_token(spec, num_tokens, runs))
    assert found.rope_delta == found.position_ids.max(initial=-1) + 1 - num_tokens
    if rule != "transformers-5.23" and tail:
        assert (found.position_ids[:, -1] == num_tokens - 1 + found.rope_delta).all(), "decoding goes on without a jump"


def test_a_clip_of_unknown_rate_counts_seconds() -> None:
    spec = PositionSpec("mrope", "transformers-4.49", 2.0)
    found = positions(spec, 3, [VisualRun("video", 0, (3, 1, 1), None)])
    np.testing.assert_array_equal(found.position_ids[0], [0, 2, 4])


def test_without_tokens_per_second_frames_are_counted() -> None:
    found = positions(PositionSpec("mrope", "transformers-4.49"), 3, [VisualRun("video", 0, (3, 1, 1), 9.0)])
    np.testing.assert_array_equal(found.position_ids[0], [0, 1, 2])


def test_sequential_positions() -> None:
    found = positions(PositionSpec("sequential"), 7, [VisualRun("image", 1, (1, 2, 2))])
    np.testing.assert_array_equal(found.position_ids, np.arange(7))
    assert found.rope_delta == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PositionSpec("alibi"), "alibi"),
        (PositionSpec("mrope"), "None"),
        (PositionSpec("mrope", "transformers-9"), "-9"),
    ],
)
def test_unknown_strategies_are_refused(spec: PositionSpec, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        positions(spec, 3, [])
