"""A plan as a table of plain text, for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from unfreeze_sched._checks import columns, listed
from unfreeze_sched.plan.phases import Phase, Plan
from unfreeze_sched.schedule import PRESETS

_BYTES = {"MiB": 2**20, "GiB": 2**30}
_NAMED = 3  # more blocks than these, joining at once at one rate, are told by the first and the last


def as_text(plan: Plan, plot: str | None = None) -> str:
    """A plan in words: what it is, a row a phase, and notes; columns of the widths that they need, the rest at 80.

    Args:
        plan: The plan.
        plot: Where its picture was written, to be said too.
    """
    header, rows = cells(plan)
    table = columns(header, rows, right=set(header) - {"epochs", "joins"}, gap=1)
    wrapped = [textwrap.fill(note, 80) for note in notes(plan, plot)]
    return "\n".join([textwrap.fill(title(plan), 80), "", table, "", *wrapped])


def title(plan: Plan) -> str:
    """What was planned, in one sentence."""
    schedule, encoder = plan.schedule, plan.encoder
    fields = schedule.preset.model_dump(exclude={"kind"})
    named = next((f"{name}: " for name, preset in PRESETS.items() if preset == schedule.preset), "")
    preset = named + ", ".join(f"{name} {value}" for name, value in fields.items())
    what = ""
    if encoder:
        model = (
            f"{encoder.name} in {encoder.model}"
            if encoder.model != "timm"
            else f"timm's {encoder.name.rpartition('/')[2]}"
        )
        what = f"{model}, {_parameters(encoder.parameters)} parameters, "
    blocks = f"{schedule.total_blocks} block{'s' if schedule.total_blocks > 1 else ''}"
    epochs = f"{schedule.total_epochs} epoch{'s' if schedule.total_epochs > 1 else ''}"
    return f"{what}{blocks}, {epochs}; {preset}"


def cells(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """The header, and one row a phase."""
    header = ["epochs", "blocks", "joins", "lr"]
    if plan.encoder:
        header += ["trainable", "share", "grads", "optim", "saved", "sum"]
    divisor = _BYTES[_unit(plan)]
    rows = []
    for phase in plan.phases:
        joins = list(_joins(phase))
        row = [
            f"{phase.first_epoch}-{phase.last_epoch}"
            if phase.last_epoch > phase.first_epoch
            else str(phase.last_epoch),
            f"{phase.unfrozen}/{plan.schedule.total_blocks}",
            "\n".join(name for name, _ in joins),
            "\n".join(rate for _, rate in joins),
        ]
        if phase.memory is not None and phase.trainable_parameters is not None:
            memory = phase.memory
            sizes = (memory.gradients, memory.optimizer, memory.activations, memory.total)
            row += [_parameters(phase.trainable_parameters), f"{100 * (phase.trainable_share or 0):.1f}%"]
            row += [f"{size / divisor:.1f}" for size in sizes]
        rows.append(row)
    return header, rows


def _joins(phase: Phase) -> Iterator[tuple[str, str]]:
    """What changes at the start of a phase, each line with its learning rate."""
    rates = phase.learning_rates
    if phase.first_epoch == 0:
        yield "head", _rate(rates["head"])
    runs: list[list[str]] = []
    for name in phase.joins:
        if runs and rates[runs[-1][0]] == rates[name]:
            runs[-1].append(name)
        else:
            runs.append([name])
    for run in runs:
        if len(run) > _NAMED:
            yield f"+ {run[0]} to {run[-1]}", _rate(rates[run[0]])
        else:
            yield from ((f"+ {name}", _rate(rates[name])) for name in run)
    for name in phase.refrozen:
        yield f"- {name}", "frozen"


def notes(plan: Plan, plot: str | None = None) -> Iterator[str]:
    """What the table's figures are, and what never trains."""
    encoder = plan.encoder
    yield "epochs: 0-based, inclusive. lr: base rate, from then on; an LR scheduler scales all of them."
    if encoder:
        unit, (height, width) = _unit(plan), encoder.image_size
        weights = sum(phase.memory.weights for phase in plan.phases[:1] if phase.memory) / _BYTES[unit]
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
        yield (
            f"never within {plan.schedule.total_epochs} epochs: {names}; "
            "start earlier, unfreeze faster, or train longer."
        )
    if plot:
        yield f"{plot} shows it."


def _unit(plan: Plan) -> str:
    most = max((phase.memory.total for phase in plan.phases if phase.memory), default=0)
    return "GiB" if most >= 10 * _BYTES["GiB"] else "MiB"


def _parameters(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return str(number)


def _rate(rate: float) -> str:
    return f"{rate:.1e}"
