"""The sections of report.html, each from the JSON of a report, or None where the JSON has nothing for it."""

import math

from markupsafe import Markup

from .charts import Bar, Curve, Dot, bars, curves, dots
from .page_parts import Document, Section, Table, cell, interval, kl_of, names, number, ratio
from .report_text import inputs_line

__all__ = ["answers", "bisect", "evidence", "gates", "layers", "pareto", "steps", "sweep", "waterfall"]

_SHOWN = 1e-3  # of the largest bar: what is smaller has no panel
_KL_FLOOR = 1e-9  # nats: below this lie rounding errors of float32, and a logarithmic axis would show nothing else


def waterfall(document: Document) -> Section | None:
    found = [v for v in document["variants"] if (v.get("waterfall") or {}).get("steps")]
    if not found:
        return None
    groups: dict[str, list[Bar]] = {}
    rows: list[list[str]] = []
    for variant in found:
        for step in variant["waterfall"]["steps"]:
            if step["skipped"] is not None:
                rows.append([variant["name"], step["name"], "", "", "", step["skipped"]])
                continue
            added = step["added"]
            bar = Bar(step["name"], *(number(added[key]) for key in ("mean", "ci_low", "ci_high")))
            groups.setdefault(variant["name"], []).append(bar)
            value = interval(added["mean"], added["ci_low"], added["ci_high"], ".2g")
            alone, total = (f"{number(step[key]['mean']):.2g}" for key in ("alone", "cumulative"))
            rows.append([variant["name"], step["name"], value, alone, total, step["about"]])
    noise = document.get("noise")
    floor = f" The reference's own noise is {number(noise['kl']['mean']):.2g}." if noise else ""
    largest = {name: max(abs(bar.value) for bar in group) for name, group in groups.items()}
    shown = {
        name: group for name, group in groups.items() if largest[name] > max(_KL_FLOOR, _SHOWN * max(largest.values()))
    }
    title = "Where the divergence comes from"
    svg = (
        Markup(bars(title, shown, order=names(document), x_label="mean KL added by the step, nats")) if shown else None
    )
    unseen = [name for name in groups if name not in shown]
    too_small = f" Too small to draw: {', '.join(unseen)}." if unseen else ""
    samples = found[0]["waterfall"]
    return Section(
        "waterfall",
        "Where it comes from",
        "Each step swaps exactly one thing, in this order, from the reference to the variant as it runs; a bar is "
        f"what the mean KL grew by.{floor}",
        svg,
        f"{samples['num_samples']} samples, {samples['num_positions']} positions; each variant has its own scale; "
        f"lines are 95 % intervals of paired differences.{too_small}",
        (Table("All steps", ("variant", "step", "added", "alone", "up to here", "what"), rows, (1, 5), folded=True),),
    )


def layers(document: Document) -> Section | None:
    found = [v for v in document["variants"] if v.get("layers")]
    if not found:
        return None
    stages = list(dict.fromkeys(layer["stage"] for variant in found for layer in variant["layers"]))
    place = {stage: index for index, stage in enumerate(stages)}
    lines = [
        Curve(
            variant["name"],
            [place[layer["stage"]] for layer in variant["layers"]],
            [number(layer["relative_l2"]) for layer in variant["layers"]],
        )
        for variant in found
    ]
    every = max(1, math.ceil(len(stages) / 16))
    ticks = {
        float(number): stage for stage, number in place.items() if number % every == 0 or number == len(stages) - 1
    }
    rows = [
        [
            variant["name"],
            layer["stage"],
            *(cell(layer[key]) for key in ("relative_l2", "snr_db", "cosine_min", "max_abs")),
        ]
        for variant in found
        for layer in variant["layers"]
    ]
    return Section(
        "layers",
        "Drift by layer",
        "Relative L2 error of each stage's output, in the order of a request. A jump names the layer that loses most.",
        Markup(
            curves("Drift by layer", lines, order=names(document), x_label="", y_label="relative L2 error", ticks=ticks)
        ),
        f"Samples: {found[0]['layers'][0]['num_samples']}.",
        (
            Table(
                "All layers",
                ("variant", "stage", "relative L2", "SNR, dB", "lowest cosine", "max abs"),
                rows,
                (1,),
                folded=True,
            ),
        ),
    )


def steps(document: Document) -> Section | None:
    found = [(v["name"], (v.get("statistics") or {}).get("by_step")) for v in document["variants"]]
    lines = [
        Curve(name, [step["step"] for step in steps], [max(number(step["mean"]), _KL_FLOOR) for step in steps])
        for name, steps in found
        if steps
    ]
    if not lines:
        return None
    return Section(
        "steps",
        "Divergence by step",
        "Mean KL at each position of the answers. A line that climbs means that errors pile up in the KV cache.",
        Markup(curves("KL by step", lines, order=names(document), x_label="answer token", y_label="mean KL, nats")),
        f"Values below {_KL_FLOOR:g} are drawn there. Late positions rest on few answers.",
    )


def pareto(document: Document) -> Section | None:
    points: list[Dot] = []
    for variant in document["variants"]:
        kl, task = kl_of(variant), variant.get("task")
        if kl is not None and math.isfinite(number(kl["mean"])):
            speed = f"{task['tokens_per_second']:,.0f} tokens/s" if task else ""
            points.append(Dot(variant["name"], variant["size"] / 1e6, max(number(kl["mean"]), _KL_FLOOR), speed))
    if len(points) < 2:
        return None
    return Section(
        "pareto",
        "Size, divergence, speed",
        "A variant is worth having if no other is both smaller and closer. Down and to the left is better.",
        Markup(dots("Size and KL", points, order=names(document), x_label="MB on disk", y_label="mean KL, nats")),
        f"Values below {_KL_FLOOR:g} are drawn there; speeds are of this run's decoding, on this machine.",
    )


def answers(document: Document) -> Section | None:
    tables: list[Table] = []
    header = ("variant", "of", "positions", "mean KL", "median", "99 %", "99.9 %", "max", "same first token")
    for key, caption in (
        ("by_class", "By class of the reference's token"),
        ("by_size", "By size of the images, in patches"),
    ):
        rows = [
            [
                variant["name"],
                name,
                f"{kl['num_positions']:,}",
                interval(kl["mean"], kl["ci_low"], kl["ci_high"], ".2g"),
                *(f"{number(kl[field]):.2g}" for field in ("median", "p99", "p999", "max")),
                f"{number(kl['same_top1']):.2%}",
            ]
            for variant in document["variants"]
            for name, kl in ((variant.get("statistics") or {}).get(key) or {}).items()
        ]
        if rows:
            tables.append(Table(caption, header, rows, (1,)))
    rows = []
    for variant in document["variants"]:
        if found := variant.get("statistics"):
            ties = sum(bool(each["tie_like"]) for each in found["divergences"])
            row = [variant["name"], ratio(found["exact_ids"]), ratio(found["exact_ids_off_ties"])]
            row += [ratio(found["first_divergence_norm"]), str(ties), str(len(found["divergences"]) - ties)]
            rows.append(row)
    if rows:
        header = (
            "variant",
            "all ids equal",
            "near ties forgiven",
            "share before the first other id",
            "tie-like",
            "errors",
        )
        tables.insert(0, Table("Free-running greedy answers", header, rows))
    kinds = _by_kind(document)
    if kinds is not None:
        tables.insert(0, kinds)
    if not tables:
        return None
    about = "Answers given freely, and where divergence is found. Digits are the most sensitive probe."
    return Section("answers", "Answers", about, tables=tuple(tables))


def _by_kind(document: Document) -> Table | None:
    scored = [v for v in document["variants"] if v.get("task")]
    if not scored:
        return None
    kinds = list(scored[0]["task"]["by_kind"])
    rows = [[v["name"], *(f"{number(v['task']['by_kind'][kind]):.1%}" for kind in kinds)] for v in scored]
    return Table("Answers right, by kind of question", ("variant", *kinds), rows)


def sweep(document: Document) -> Section | None:
    found = document.get("sweep") or []
    if not found:
        return None
    rows = [
        [
            each["case"],
            each["id"],
            each["variant"],
            each["stage"],
            each["metric"],
            cell(each["value"]),
            cell(each["limit"]),
            each["skipped"] or each["outcome"],
        ]
        for each in found
    ]
    header = ("case", "input", "variant", "stage", "metric", "value", "limit", "outcome")
    about = "Inputs that break ports: odd shapes, many images in one call, long contexts, reused caches."
    held = sum(each["outcome"] == "PASS" for each in found)
    return Section(
        "sweep", "Inputs that bite", about, tables=(Table(f"{held} of {len(found)} held", header, rows, (1, 2, 3, 4)),)
    )


def bisect(document: Document) -> Section | None:
    rows: list[list[str]] = []
    sentences: list[str] = []
    for variant in document["variants"]:
        if not (found := variant.get("bisect")):
            continue
        first = found["first"]
        where = (
            "none leaves it" if first is None else f"{first['role']}, {first['name']} ({', '.join(first['operators'])})"
        )
        sentences.append(f"{variant['name']}: {where}.")
        rows += [
            [
                variant["name"],
                point["role"],
                point["name"],
                *(cell(point[key]) for key in ("own", "accumulated", "tolerance")),
                point["outcome"],
            ]
            for point in found["points"]
        ]
    if not sentences:
        return None
    header = ("variant", "role", "operator", "own error", "accumulated", "tolerance", "outcome")
    about = (
        "The first operator whose output leaves its tolerance when it is given the reference's own input. "
        + " ".join(sentences)
    )
    return Section(
        "bisect", "First operator at fault", about, tables=(Table("All", header, rows, (1, 2), folded=True),)
    )


def gates(document: Document) -> Section:
    rows = [
        [variant["name"], gate["stage"], gate["metric"], cell(gate["value"]), cell(gate["limit"]), gate["outcome"]]
        for variant in document["variants"]
        for row in variant["rows"]
        for gate in row["gates"]
    ]
    missing = [
        [variant["name"], record["stage"], record["sample"], record["reason"]]
        for variant in document["variants"]
        for record in variant["not_compared"]
    ]
    tables = [
        Table("Every limit", ("variant", "stage", "metric", "value", "limit", "outcome"), rows, (1, 2), folded=True)
    ]
    if missing:
        tables.append(Table("Not compared", ("variant", "stage", "sample", "reason"), missing, (1, 2, 3), folded=True))
    held = sum(row[-1] == "PASS" for row in rows)
    about = f"{held} of {len(rows)} limits held. Limits: {document['gates']['origin']}. Missing evidence fails."
    return Section("gates", "Gates", about, tables=tuple(tables))


def evidence(document: Document) -> Section:
    package = document["package"]
    files = [
        [f"{whose}: {name}", digest]
        for whose, found in (
            ("package", package["files"]),
            ("reference", document["reference_files"]),
            ("task", document["task_files"]),
        )
        for name, digest in found.items()
    ]
    proven = [(variant["name"], inputs_line(variant)) for variant in document["variants"]]
    proof = " ".join(f"{name}: {text}." for name, text in proven if text)
    return Section(
        "evidence",
        "What was judged",
        " ".join(filter(None, ["The verdict holds for these bytes on this provider, and for nothing else.", proof])),
        tables=(
            Table("Environment", ("part", "version"), [[k, str(v)] for k, v in document["versions"].items()], (1,)),
            Table("sha256 of every file that was judged", ("file", "sha256"), files, (1,), folded=True),
        ),
    )
