"""What a transition costs: `apply` and `sync` against `add_param_group`, re-creating AdamW, and the ways of others.

    python benchmarks/speed/transition.py [--quick] [--output FOLDER]

In each arm the same parameters join an AdamW that has a state for the head, with a cosine scheduler attached; what an
arm does is in `transition_arms.py`. The arms' groups are asserted equal before anything is timed, and what survives of
moments, step counts and LR schedule is looked up after a transition. Arms take turns, each in a setting of its own, and
a ratio is the median over rounds of the ratio to the floor of that round.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Spread, as_markdown, in_turn, no_collection, parse, ratio, surroundings, verdict, write
from networks import NETWORKS
from transition_arms import ARMS, FLOOR, Arm, Network, Setting, agreeing, survival

SIZES = (200, 2_000, 20_000, 100_000)
ROUNDS = {200: 31, 2_000: 31, 20_000: 7, 100_000: 3}
DIFFERENT = {"Lightning", "fastai's freeze_to"}
LIBRARY = ("apply, late", "apply, declared", "sync, late", "sync, declared")


def one(network: Network, arm: Arm) -> float:
    """Seconds of one transition, of this thread's processor time: others use the machine too.

    The joining parameters are looked at once before: whether they lie in the cache, as some arms' preparations leave
    them, is worth a millisecond per 1,000.
    """
    setting = Setting.of(network, arm)
    transition = arm.make(setting)
    for body in network.bodies:
        for parameter in body:
            assert parameter.is_leaf
    with no_collection():
        begin = time.thread_time()
        transition()
        return (time.thread_time() - begin) / arm.calls


def measure(network: Network, tensors: int, rounds: int, most: int = 10**9) -> dict[str, dict[str, Any]]:
    """Seconds, ratios and memory of each arm, on one network; arms that grow with the square up to `most` tensors."""
    agreed = agreeing(network, tensors)
    wanted = {name for name, arm in ARMS.items() if arm.is_there and tensors <= arm.most} - DIFFERENT
    assert wanted <= set(agreed), f"arms differ: {wanted - set(agreed)}"
    there = {name: arm for name, arm in ARMS.items() if arm.is_there and tensors <= arm.most}
    arms = {name: arm for name, arm in there.items() if arm.most == 10**9 or tensors <= most}
    slow = {name for name, arm in arms.items() if arm.most < 10**9}
    found = in_turn({name: lambda arm=arm: one(network, arm) for name, arm in arms.items() if name not in slow}, rounds)  # type: ignore[misc]
    for name in slow:  # enough to see how they grow
        found[name] = [one(network, arms[name]) for _ in range(min(rounds, 5))]
    floor = found[FLOOR]
    rows = {}
    for name, values in found.items():
        rows[name] = {
            "ms": Spread.of(values).scaled(1e3),
            "ratio": ratio(values, floor[: len(values)]),
            "python bytes": python_bytes(network, arms[name]),
            **survival(network, arms[name], counted=name not in slow or tensors <= 200),
        }
    apply = found["apply, late"]
    for name in ("re-creating AdamW", "re-creating, state by reference", "re-creating, state by load_state_dict"):
        rows[name]["over apply"] = ratio(found[name], apply)
    return rows


def python_bytes(network: Network, arm: Arm) -> int:
    """The most that Python's objects take during a transition, over what was there; tensors' own memory aside."""
    setting = Setting.of(network, arm)
    transition = arm.make(setting)
    with no_collection():
        tracemalloc.start()
        try:
            transition()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


def exponent(first: float, last: float, sizes: float) -> float:
    """Of the growth between two sizes: 1 is linear."""
    return math.log(last / first) / math.log(sizes)


def targets(found: dict[int, dict[str, dict[str, Any]]]) -> list[dict[str, str]]:
    """The targets, with what was measured, at 2,000 tensors and above."""
    large = {size: rows for size, rows in found.items() if size >= 2_000}
    least, most = min(large), max(large)

    def row(target: str, limit: float, values: dict[int, float], *, at_least: bool = False) -> dict[str, str]:
        shown = ", ".join(f"{value:.2f} at {size:,}" for size, value in values.items())
        worst = min(values.values()) if at_least else max(values.values())
        return {"target": target, "measured": shown, "": verdict(worst, limit, at_least=at_least)}

    rows = [
        row(
            f"`{name}` at most {limit} of the floor",
            limit,
            {s: rows[name]["ratio"].median for s, rows in large.items()},
        )
        for name, limit in zip(LIBRARY, (1.5, 1.5, 2.2, 2.2), strict=True)
    ]
    rows += [
        row(
            f"{name} at least 3 times `apply, late`",
            3,
            {s: rows[name]["over apply"].median for s, rows in large.items()},
            at_least=True,
        )
        for name in ("re-creating, state by load_state_dict", "re-creating, state by reference")
    ]
    rows.append(
        row(
            "no-op `apply`, microseconds, at most 10",
            10,
            {s: 1e3 * rows["apply, nothing to do"]["ms"].median for s, rows in found.items()},
        )
    )
    if most > least:
        growth = {
            name: exponent(found[least][name]["ms"].median, found[most][name]["ms"].median, most / least)
            for name in (FLOOR, "apply, late", "sync, late")
        }
        rows.append(
            {
                "target": f"growth from {least:,} to {most:,} tensors linear or better (exponent at most 1)",
                "measured": ", ".join(f"{value:.2f} {name}" for name, value in growth.items()),
                "": verdict(growth["apply, late"], 1.0),
            }
        )
    kept = {rows[name]["tensor bytes, kept"] for rows in found.values() for name in LIBRARY}
    peak = max(int(rows[name]["tensor bytes, peak"].replace(",", "")) for rows in found.values() for name in LIBRARY)
    rows.append(
        {
            "target": "no bytes of tensors beyond the new parameters' own state",
            "measured": f"kept {', '.join(sorted(kept))}; at most {peak} for a moment",
            "": verdict(float(kept != {"0"}), 0),
        }
    )
    return rows


def cells(rows: dict[str, dict[str, Any]]) -> str:
    """The table of one network."""
    return as_markdown(
        [
            {
                "arm": name,
                "ms": f"{row['ms'].show(4)}",
                "over the floor": row["ratio"].show(2) if name != "apply, nothing to do" else "-",
                "Python, peak KiB": f"{row['python bytes'] / 1024:,.0f}",
                **{key: row[key] for key in ("tensor bytes, peak", "tensor bytes, kept")},
            }
            for name, row in rows.items()
        ]
    )


def survives(rows: dict[str, dict[str, Any]]) -> str:
    keys = ("moments", "step counts", "LR schedule", "joined")
    return as_markdown([{"arm": name, **{key: row[key] for key in keys}} for name, row in rows.items()])


def draw(
    found: dict[int, dict[str, dict[str, Any]]], models: dict[str, dict[str, dict[str, Any]]]
) -> Callable[[Any], None]:
    """Times over sizes, and ratios to the floor for the models."""

    def on(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
        arms = list(next(iter(found.values())))
        markers = dict(zip(arms, "osDv^<>Ph*Xpd", strict=False))
        for name in arms:
            sizes = [size for size in found if name in found[size]]
            style = "-" if name in LIBRARY or name == FLOOR else ":"
            medians = [found[s][name]["ms"].median for s in sizes]
            left.plot(sizes, medians, style, marker=markers[name], markersize=4, linewidth=1, label=name)
        left.set(xscale="log", yscale="log", xlabel="tensors, half of them joining", ylabel="ms a transition, median")
        left.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        left.grid(visible=True, alpha=0.3)
        shown = [name for name in arms if name not in {FLOOR, "apply, nothing to do"}]
        for place, (model, rows) in enumerate(models.items()):
            names = [name for name in shown if name in rows]
            ys = [shown.index(name) + 0.25 * (place - 1) for name in names]
            right.barh(ys, [rows[name]["ratio"].median for name in names], height=0.22, label=model)
        right.axvline(1, color="black", linewidth=0.8)
        right.set(xscale="log", xlabel="times the floor", yticks=range(len(shown)))
        right.set_yticklabels(shown, fontsize=7)
        right.invert_yaxis()
        if models:
            right.legend(fontsize=7)

    return on


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the table; it is written anew after each network, since the largest take long."""
    args = parse(__doc__, argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    most = 200 if args.quick else 10**9
    found: dict[int, dict[str, dict[str, Any]]] = {}
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for size in SIZES[:2] if args.quick else SIZES[:3]:
        found[size] = measure(Network.of(size), size, 3 if args.quick else ROUNDS[size], most)
    publish(found, models, args.output, began)
    for name, make in list(NETWORKS.items())[: 1 if args.quick else None]:
        by_value = ARMS.pop("Lightning") if "meta" in name else None  # it has no values to compare
        try:
            models[name] = measure(make(), 200, 3 if args.quick else 15, most)
        finally:
            if by_value is not None:
                ARMS["Lightning"] = by_value
        publish(found, models, args.output, began)
    for size in () if args.quick else SIZES[3:]:
        found[size] = measure(Network.of(size), size, ROUNDS[size])
        publish(found, models, args.output, began)


def publish(
    found: dict[int, dict[str, dict[str, Any]]],
    models: dict[str, dict[str, dict[str, Any]]],
    output: Path,
    began: float,
) -> None:
    """Write what there is so far."""
    versions = surroundings("lightning", "finetuning-scheduler", "fastai", "timm", "segmentation-models-pytorch")
    versions["seconds in all"] = round(time.perf_counter() - began)
    survived = found[min(size for size in found if size >= 2_000)]
    parts = [
        "# What a transition costs",
        (
            "Made by `python benchmarks/speed/transition.py`. Half of the tensors are a head with moments in AdamW, under a cosine "
            "scheduler; the other half join. Medians, interquartile ranges in brackets. The floor is a bare "
            "`add_param_group`, which neither sets `requires_grad` nor tells the scheduler."
        ),
        "## Targets",
        as_markdown(targets(found)),
        (
            "At 2,000 tensors all lies in the processor's cache, where the floor is cheapest. What `apply` adds there is a "
            "look at each flag and each gradient, an assignment of each flag, and a fixed part, which is most of it for the "
            "models. At 20,000 the floor's own walks through memory are what costs, and the growth holds that change, too. "
            "By reference, re-creating walks the parameters about as often as `apply` does; the documented way copies."
        ),
        "## What survives",
        (
            "Looked up after the transition of the smallest such size, the scheduler driven on over one and a half periods. "
            "finetuning-scheduler's path here is its optimizer side alone, without its Trainer. Lightning compares by value, "
            "so in a new network it leaves out what equals another parameter; see the models."
        ),
        survives(survived),
    ]
    for size, rows in found.items():
        parts += [f"## {size:,} tensors, {rows[FLOOR]['ms'].repeats} rounds", cells(rows)]
    for name, rows in models.items():
        parts += [
            f"## {name}",
            "All blocks of the encoder join at once, each in a group of its own.",
            cells(rows),
            survives(rows),
        ]
    write(
        "transition",
        output,
        {"versions": versions, "tensors": found, "models": models},
        "\n\n".join(parts),
        draw(found, models),
    )


if __name__ == "__main__":
    main()
