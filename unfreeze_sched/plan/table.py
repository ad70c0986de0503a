"""A plan as a table of plain text, for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby

from unfreeze_sched._checks import columns, listed
from unfreeze_sched.plan.phases import Phase, Plan
from unfreeze_sched.schedule import PRESETS

BYTES = {"MiB": 2**20, "GiB": 2**30}
_NAMED = 3  # more blocks than these, joining at once at one rate, are told by the first and the last


def as_text(plan: Plan, plot: str | None = None) -> str:
    """A plan in words, 80 columns wide if it can be: what it is, a row a phase, and notes, also on its picture."""
    header = ["epochs", "blocks", "joins", "lr"]
    if plan.encoder:
        header += ["trainable", "share", "grads", "optim", "saved", "sum"]
    table = columns(
        header, (_cells(plan, phase) for phase in plan.phases), right={*header} - {"epochs", "joins"}, gap=1
    )
    wrapped = [textwrap.fill(note, 80) for note in _notes(plan, plot)]
    return "\n".join([textwrap.fill(title(plan), 80), "", table, "", *wrapped])


def title(plan: Plan) -> str:
    """What was planned, in one sentence."""
    schedule, encoder = plan.schedule, plan.encoder
    named = [f"{name}: " for name, preset in PRESETS.items() if preset == schedule.preset]
    fields = schedule.preset.model_dump(exclude={"kind"})
    preset = "".join(named[:1]) + ", ".join(f"{name} {value}" for name, value in fields.items())
    what = ""
    if encoder:
        what = f"{encoder.name} in {encoder.model}"
        if encoder.model == "timm":
            what = f"timm's {encoder.name.rpartition('/')[2]}"
        what += f", {in_short(encoder.parameters)} parameters, "
    blocks = f"{schedule.total_blocks} block{'s' if schedule.total_blocks > 1 else ''}"
    epochs = f"{schedule.total_epochs} epoch{'s' if schedule.total_epochs > 1 else ''}"
    return f"{what}{blocks}, {epochs}; {preset}"


def _cells(plan: Plan, phase: Phase) -> list[str]:
    first, last, joins = phase.first_epoch, phase.last_epoch, list(_joins(phase))
    epochs = f"{first}-{last}" if last > first else str(last)
    names, rates = ("\n".join(lines) for lines in zip(*joins, strict=True)) if joins else ("", "")
    cells = [epochs, f"{phase.unfrozen}/{plan.schedule.total_blocks}", names, rates]
    if phase.memory is not None:
        memory, divisor = phase.memory, BYTES[unit_of(plan)]
        sizes = (memory.gradients, memory.optimizer, memory.activations, memory.total)
        cells += [in_short(phase.trainable_parameters or 0), f"{100 * (phase.trainable_share or 0):.1f}%"]
        cells += [f"{size / divisor:.1f}" for size in sizes]
    return cells


def _joins(phase: Phase) -> Iterator[tuple[str, str]]:
    """What changes at the start of a phase, each line with its learning rate."""
    rates = phase.learning_rates
    if phase.first_epoch == 0:
        yield "head", f"{rates['head']:.1e}"
    for rate, run in groupby(phase.joins, rates.__getitem__):
        names = list(run)
        if len(names) > _NAMED:
            names = [f"{names[0]} to {names[-1]}"]
        yield from ((f"+ {name}", f"{rate:.1e}") for name in names)
    for name in phase.refrozen:
        yield f"- {name}", "frozen"


def _notes(plan: Plan, plot: str | None) -> Iterator[str]:
    """What the table's figures are, and what never trains."""
    encoder = plan.encoder
    yield "epochs: 0-based, inclusive. lr: base rate, from then on; an LR scheduler scales all of them."
    if encoder:
        unit, (height, width) = unit_of(plan), encoder.image_size
        weights = sum(phase.memory.weights for phase in plan.phases[:1] if phase.memory) / BYTES[unit]
        yield (
            f"{unit}: gradients, state of {encoder.optimizer}, activations saved for backward (batch of "
            f"{encoder.batch_size} at {height}x{width}, float32, each storage once), and their sum with {weights:.1f} "
            "of weights and buffers; what a step allocates for a moment is not in it."
        )
        if encoder.unused:
            yield f"in no phase, since no gradient reaches it: {listed(encoder.unused)}."
    never = [block.name for block in plan.blocks if block.first_epoch is None][::-1]
    if never:
        names = ", ".join(never) if len(never) <= 2 * _NAMED else f"{never[0]} to {never[-1]}"
        epochs = plan.schedule.total_epochs
        yield f"never within {epochs} epochs: {names}; start earlier, unfreeze faster, or train longer."
    if plot:
        yield f"{plot} shows it."


def unit_of(plan: Plan) -> str:
    """In which unit the plan's memory is told."""
    most = max((phase.memory.total for phase in plan.phases if phase.memory), default=0)
    return "GiB" if most >= 10 * BYTES["GiB"] else "MiB"


def in_short(number: int) -> str:
    """A number of parameters."""
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return str(number)
