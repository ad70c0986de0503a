"""A plan as a table for the terminal: by rich where it is installed, else plain text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from unfreeze_sched.plan.phases import Phase, Plan
from unfreeze_sched.schedule import PRESETS

_BYTES = {"MiB": 2**20, "GiB": 2**30}
_WIDE = 100  # columns of a terminal
_NAMED = 3  # more blocks than these, joining at once at one rate, are told by the first and the last


def show(plan: Plan, plot: str | None = None) -> None:
    """Print a plan.

    Args:
        plan: The plan.
        plot: Where its picture was written, to be said too.
    """
    try:
        from rich.console import Console  # noqa: PLC0415  # optional
    except ModuleNotFoundError:
        print(plain(plan, plot))  # noqa: T201  # a command's voice
        return
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  # likewise
    from rich.table import Table  # noqa: PLC0415  # likewise
    from rich.text import Text  # noqa: PLC0415  # likewise

    console = Console(highlight=False)
    header, rows = cells(plan)
    gap = 1 if console.width >= _WIDE else 0  # beside the box's own
    table = Table(box=SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
    for name in header:
        joins = name == "joins"
        table.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=not joins, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(title(plan), style="bold", markup=False)
    console.print()
    console.print(table)
    console.print()
    for note in notes(plan, plot):
        console.print(note, markup=False)


_LEFT = ("epochs", "joins")


def plain(plan: Plan, plot: str | None = None) -> str:
    """The same without rich: columns of the widths that their cells need, notes at 80."""
    header, rows = cells(plan)
    lines = [header, ["-" * len(name) for name in header]]
    for row in rows:
        parts = [cell.split("\n") for cell in row]
        height = max(map(len, parts))
        lines += map(list, zip(*(part + [""] * (height - len(part)) for part in parts), strict=True))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines[1] = ["-" * width for width in widths]
    table = [
        " ".join(
            cell.ljust(width) if name in _LEFT else cell.rjust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    wrapped = [textwrap.fill(note, 80) for note in notes(plan, plot)]
    return "\n".join([textwrap.fill(title(plan), 80), "", *table, "", *wrapped])


def title(plan: Plan) -> str:
    """What was planned, in one sentence."""
    schedule, encoder = plan.schedule, plan.encoder
    fields = schedule.preset.model_dump(exclude={"kind"})
    named = next((f"{name}: " for name, preset in PRESETS.items() if preset == schedule.preset), "")
    preset = named + ", ".join(f"{name} {value}" for name, value in fields.items())
    what = ""
    if encoder:
        model = f"{encoder.name} in {encoder.model}" if encoder.model != "timm" else f"timm's {encoder.name}"
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
            more = f" and {len(encoder.unused) - 1} more" if len(encoder.unused) > 1 else ""
            yield f"in no phase, since no gradient reaches it: {encoder.unused[0]}{more}."
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
