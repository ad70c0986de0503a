"""What a training step costs with the library, against an optimizer that was built at once for the same parameters.

    python benchmarks/speed/step_cost.py [--quick] [--output FOLDER]

Three phases of a run: before the first transition, between two, after the last. The arms share one network and take
turns, a whole step each: zero_grad, forward, backward, optimizer. `late` and `declared` have one group a block, as the
library makes them; `merged` is the library on one block that holds all that is unfrozen; `built at once` is what one
would write by hand, the head's group and one for the rest. The weights after a step are asserted equal to the bit.
Times are processor time of one thread; a ratio is the median over rounds of the ratio to that round's first arm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import Spread, as_markdown, in_turn, no_collection, parse, ratio, surroundings, verdict, write
from networks import Training, unet, vit
from torch.optim import AdamW, Optimizer

from unfreeze_sched import Block, MilestonePreset, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.model.freezing import norms_of

LR = 1e-5
SCALE = 0.1
REFERENCE = "built at once"
IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@dataclass
class Arm:
    """An optimizer, and what comes before each epoch."""

    optimizer: Optimizer
    unfreezer: ProgressiveUnfreezer | None = None

    def step(self, training: Training) -> tuple[float, float]:
        """Seconds of a whole step, and of the optimizer's part."""
        begin = time.process_time()
        self.optimizer.zero_grad()
        training.backward()
        middle = time.process_time()
        self.optimizer.step()
        end = time.process_time()
        return end - begin, end - middle


def arms(training: Training, number: int, options: dict[str, Any]) -> dict[str, Arm]:
    """All of them at the phase with so many unfrozen blocks; late ones have gone through each phase before it."""
    network, found = training.network, {}
    for membership in ("late", "declared"):
        optimizer = AdamW(network.head, lr=LR, **options)
        schedule = UnfreezeSchedule(
            preset=MilestonePreset(milestones={n: n for n in range(1, len(network.blocks) + 1)}),
            total_blocks=len(network.blocks),
            total_epochs=len(network.blocks) + 1,
        )
        unfreezer = ProgressiveUnfreezer(
            network.blocks,
            optimizer,
            schedule,
            learning_rate_scale=SCALE,
            membership=membership,
        )
        for epoch in range(number + 1):
            unfreezer.apply(epoch)
        found[membership] = Arm(optimizer, unfreezer)
    body = [parameter for block in network.blocks[::-1][:number] for parameter in block.parameters()]
    optimizer = AdamW(network.head, lr=LR, **options)
    if number:
        whole = Block("whole", tuple(m for block in network.blocks[::-1][:number] for m in block.members))
        preset = MilestonePreset(milestones={0: 1})
        schedule = UnfreezeSchedule(preset=preset, total_blocks=1, total_epochs=1)
        merged = ProgressiveUnfreezer([whole], optimizer, schedule, learning_rate_scale=SCALE)
        merged.apply(0)
        found["merged"] = Arm(optimizer, merged)
    groups: list[dict[str, Any]] = [{"params": network.head}, *([{"params": body, "lr": LR * SCALE}] if number else [])]
    return {REFERENCE: Arm(AdamW(groups, lr=LR, **options)), **found}


def assert_equal_steps(training: Training, found: dict[str, Arm]) -> None:
    """From the same weights and gradients each arm's optimizer makes the same step, to the bit."""
    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]
    training.backward()
    before = [parameter.detach().clone() for parameter in parameters]
    target: list[torch.Tensor] = []
    for name, arm in found.items():
        arm.optimizer.step()
        after = [parameter.detach().clone() for parameter in parameters]
        target = target or after
        assert all(map(torch.equal, after, target)), f"{name} differs"
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def measure(training: Training, rounds: int, implementations: Sequence[str]) -> list[dict[str, Any]]:
    """One row an implementation, phase and arm."""
    total = len(training.network.blocks)
    rows = []
    for implementation in implementations:
        for phase, number in (("before", 0), ("between", total // 2), ("after", total)):
            training.model.train()
            found = arms(training, number, IMPLEMENTATIONS[implementation])
            assert_equal_steps(training, found)
            steps: dict[str, list[float]] = {name: [] for name in found}

            def whole(name: str, arm: Arm, steps: dict[str, list[float]] = steps) -> float:
                with no_collection():
                    step, own = arm.step(training)
                steps[name].append(own)
                return step

            calls: dict[str, Callable[[], float]] = {
                name: lambda name=name, arm=arm: whole(name, arm)  # type: ignore[misc]
                for name, arm in found.items()
            }
            times = in_turn(calls, rounds)
            rows += [
                {
                    "implementation": implementation,
                    "phase": phase,
                    "blocks": number,
                    "groups": len(arm.optimizer.param_groups),
                    "arm": name,
                    "step, ms": Spread.of(times[name]).scaled(1e3),
                    "ratio": ratio(times[name], times[REFERENCE]),
                    "optimizer, ms": Spread.of(steps[name]).scaled(1e3),
                    # The same with the noise of forward and backward left out: they are the same in all arms.
                    "extra of a step": Spread.of(
                        [
                            (own - other) / whole_step
                            for own, other, whole_step in zip(
                                steps[name], steps[REFERENCE], times[REFERENCE], strict=True
                            )
                        ]
                    ),
                }
                for name, arm in found.items()
            ]
            for parameter in training.model.parameters():
                parameter.grad = None
    return rows


def norm_keeping(training: Training, rounds: int) -> dict[str, Spread]:
    """`model.train()` and a step of the frozen phase: norms held by the library, or put into evaluation mode by hand."""
    network, model = training.network, training.model
    norms = [module for block in network.blocks for module in norms_of(block)]
    for parameter in model.parameters():
        parameter.grad = None
    held = arms(training, 0, {"fused": True})["late"].optimizer
    by_hand = AdamW(network.head, lr=LR, fused=True)
    holds = [module.__dict__.get("train") for module in norms]

    def prepare(*, library: bool) -> None:
        for module, hold in zip(norms, holds, strict=True):
            module.__dict__.pop("train", None)
            if hold is not None and library:
                module.__dict__["train"] = hold

    def mode(*, library: bool) -> None:
        model.train()
        if not library:
            for module in norms:
                module.eval()

    def timed(*, library: bool, whole: bool) -> float:
        prepare(library=library)
        with no_collection():
            begin = time.process_time()
            mode(library=library)
            if whole:
                optimizer = held if library else by_hand
                optimizer.zero_grad()
                training.backward()
                optimizer.step()
            return time.process_time() - begin

    found = {
        whole: in_turn(
            {
                "by hand": lambda whole=whole: timed(library=False, whole=whole),  # type: ignore[misc]
                "held": lambda whole=whole: timed(library=True, whole=whole),  # type: ignore[misc]
            },
            rounds,
        )
        for whole in (True, False)
    }
    prepare(library=True)
    middle = Spread.of(found[True]["by hand"]).median
    extra = [(one - other) / middle for one, other in zip(found[False]["held"], found[False]["by hand"], strict=True)]
    return {"ratio": ratio(found[True]["held"], found[True]["by hand"]), "share": Spread.of(extra)}


def probing(training: Training, rounds: int) -> dict[str, Spread]:
    """The first step after a transition at which all blocks joined, against later ones."""
    late = arms(training, len(training.network.blocks), {"fused": True})["late"]
    assert late.unfreezer is not None
    first_step = late.unfreezer.rebuilder.first_step
    named = [subset.named for subsets in late.unfreezer.rebuilder.subsets for subset in subsets]
    late.step(training)

    def timed(*, probe: bool) -> float:
        for some in named if probe else []:
            first_step.watch(some)
        with no_collection():
            return late.step(training)[0]

    def look() -> float:
        for some in named:
            first_step.watch(some)
        with no_collection():
            begin = time.process_time()
            first_step._look()  # noqa: SLF001  # what the hook calls before the step
            return time.process_time() - begin

    times = in_turn({"off": lambda: timed(probe=False), "on": lambda: timed(probe=True)}, rounds)
    middle = Spread.of(times["off"]).median
    return {"ratio": ratio(times["on"], times["off"]), "share": Spread.of([look() / middle for _ in range(rounds)])}


def text_of(rows: dict[str, list[dict[str, Any]]], kept: dict[str, dict[str, dict[str, Spread]]]) -> str:
    """Targets and tables."""
    verdicts = []
    for name, own in rows.items():
        for arm in ("late", "declared", "merged"):
            of_arm = [row for row in own if row["arm"] == arm]
            worst = max(of_arm, key=lambda row: row["ratio"].median)
            verdicts.append(
                {
                    "target": f"{name}, {arm}: a step within 2 % of one built at once",
                    "measured": f"worst of {len(of_arm)} medians {100 * (worst['ratio'].median - 1):+.1f} % "
                    f"(range {100 * worst['ratio'].iqr:.1f}), {worst['implementation']}, {worst['phase']}; the "
                    f"optimizer's own part at most {100 * max(r['extra of a step'].median for r in of_arm):+.1f} % of a step",
                    "": verdict(worst["ratio"].median, 1.02),
                }
            )
        for what, found in kept[name].items():
            verdicts.append(
                {
                    "target": f"{name}: cost of the {'norm keeping' if what == 'norms' else 'probe'} within 1 %",
                    "measured": f"{100 * found['share'].median:+.3f} % (range {100 * found['share'].iqr:.3f}) by itself; "
                    f"whole steps {100 * (found['ratio'].median - 1):+.1f} % (range {100 * found['ratio'].iqr:.1f})",
                    "": verdict(found["share"].median, 0.01),
                }
            )
    parts = [
        "# What a step costs",
        (
            "Made by `python benchmarks/speed/step_cost.py`, whose head says what the arms are. Medians, interquartile ranges in "
            "brackets."
        ),
        "## Targets",
        as_markdown(verdicts),
        (
            "The norms' cost by itself is that of `model.train()` on held norms less that of `model.train()` and `.eval()` on "
            "each by hand, once a step; a loop calls it once an epoch. The probe looks once, in the first step after a "
            "transition; here all blocks joined at once."
        ),
    ]
    for name, own in rows.items():
        parts += [
            f"## {name}",
            as_markdown(
                [
                    {
                        "AdamW": row["implementation"],
                        "phase": f"{row['phase']}, {row['blocks']} blocks",
                        "arm": row["arm"],
                        "groups": row["groups"],
                        "step, ms": row["step, ms"].show(1),
                        "over built at once": row["ratio"].show(3),
                        "optimizer, ms": row["optimizer, ms"].show(2),
                        "optimizer's extra, % of a step": row["extra of a step"].scaled(100).show(2),
                    }
                    for row in own
                ]
            ),
        ]
    return "\n\n".join(parts)


def draw(rows: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    """Ratio by implementation and phase."""

    def on(figure: Any) -> None:
        axes = figure.subplots(1, len(rows), squeeze=False)[0]
        for axis, (name, own) in zip(axes, rows.items(), strict=True):
            places = list(dict.fromkeys((row["implementation"], row["phase"]) for row in own))
            for shift, arm in enumerate(("late", "declared", "merged")):
                of_arm = [row for row in own if row["arm"] == arm]
                axis.errorbar(
                    [places.index((row["implementation"], row["phase"])) + 0.2 * (shift - 1) for row in of_arm],
                    [100 * (row["ratio"].median - 1) for row in of_arm],
                    [50 * row["ratio"].iqr for row in of_arm],
                    fmt="o",
                    capsize=2,
                    label=arm,
                )
            axis.axhspan(-2, 2, color="gray", alpha=0.15)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set(title=name, ylabel="% over built at once, a whole step", xticks=range(len(places)))
            axis.set_xticklabels([f"{i}\n{phase}" for i, phase in places], fontsize=7)
            axis.legend(fontsize=7)

    return on


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    args = parse(__doc__, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    networks: dict[str, tuple[Callable[[], Training], int, list[str]]]
    if args.quick:
        networks = {"efficientnet-b0 Unet, 32 pixels, batch 2": (lambda: Training.of(unet(), 32, 2), 2, ["fused"])}
    else:
        networks = {
            "efficientnet-b0 Unet, 96 pixels, batch 4": (lambda: Training.of(unet(), 96, 4), 11, [*IMPLEMENTATIONS]),
            "ViT-B, 112 pixels, batch 1": (lambda: Training.of(vit(112), 112, 1), 7, [*IMPLEMENTATIONS]),
        }
    rows: dict[str, list[dict[str, Any]]] = {}
    kept: dict[str, dict[str, dict[str, Spread]]] = {}
    for name, (make, rounds, implementations) in networks.items():
        training = make()
        rows[name] = measure(training, rounds, implementations)
        kept[name] = {"norms": norm_keeping(training, rounds), "probe": probing(training, rounds)}
        del training
        versions = {
            **surroundings("timm", "segmentation-models-pytorch"),
            "seconds in all": round(time.perf_counter() - began),
        }
        result = {"versions": versions, "rows": rows, "keeping": kept}
        write("step_cost", args.output, result, text_of(rows, kept), draw(rows))


if __name__ == "__main__":
    main()
