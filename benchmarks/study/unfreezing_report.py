"""Statistics, tables and plots of the unfreezing study: everything is computed from the cells."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, median
from typing import Any

from measuring import as_markdown
from pairing import LEVEL, Interval, Table, against, comparison, holm, interval, of, paired, shown
from studying import write_json
from unfreezing_arms import ARMS, EVALUATIONS
from unfreezing_statistics import at, final, loss_ratio, reach, shifted, tables

PARTS = {"test": final("test"), "noise": shifted("noise"), "blur": shifted("blur")}
GUIDE = {"0 blocks": "0", "1-2": "+1 to +2", "3-4": "+2 to +3", "5-6": "+1 to +2", "7": "0 to +1", "in all": "+3 to +8"}


def main_table(table: Table) -> str:
    """The end of the run: validation, test, and the paired differences on the test part."""
    measure = final("test")
    frozen, kept = against(table, "frozen", measure), against(table, "kept", measure)
    rows = []
    for arm in table:
        to_frozen, p_frozen = shown(frozen, arm)
        to_kept, p_kept = shown(kept, arm)
        rows.append(
            {
                "arm": ARMS[arm].text,
                "validation": str(interval(of(table, arm, final("validation")))),
                "test": str(interval(of(table, arm, measure))),
                "test, to frozen": to_frozen,
                "p": p_frozen,
                "test, to kept": to_kept,
                "p ": p_kept,
            }
        )
    return as_markdown(rows)


def shift_table(table: Table) -> str:
    """The shifted test part."""
    rows = []
    columns = {
        (kind, other): against(table, other, shifted(kind))
        for kind in ("noise", "blur")
        for other in ("frozen", "kept")
    }
    for arm in table:
        row = {"arm": ARMS[arm].text}
        for kind in ("noise", "blur"):
            row[kind] = str(interval(of(table, arm, shifted(kind))))
            for other in ("frozen", "kept"):
                row[f"{kind}, to {other}"] = shown(columns[kind, other], arm)[0]
        rows.append(row)
    return as_markdown(rows)


def phase_table(table: Table) -> str:
    """Test mIoU gained in each phase, in all, and beyond what the frozen arm gained in the same steps."""
    rows = [{"arm": "the guide expects", **GUIDE, "in all, beyond frozen": ""}]
    for arm in table:
        row = {"arm": ARMS[arm].text, "0 blocks": f"(at {interval(of(table, arm, at(0)))})"}
        for place, phase in enumerate(("1-2", "3-4", "5-6", "7")):
            row[phase] = _gain(table, arm, place, place + 1).signed
        row["in all"] = _gain(table, arm, 0, 4).signed
        row["in all, beyond frozen"] = (
            paired(_gains(table, arm, 0, 4), _gains(table, "frozen", 0, 4)).signed
            if "frozen" in table and arm != "frozen"
            else ""
        )
        rows.append(row)
    return as_markdown(rows)


def _gains(table: Table, arm: str, first: int, last: int) -> list[float]:
    return [b - a for a, b in zip(of(table, arm, at(first)), of(table, arm, at(last)), strict=True)]


def _gain(table: Table, arm: str, first: int, last: int) -> Interval:
    return interval(_gains(table, arm, first, last))


def loss_table(table: Table) -> str:
    """The loss around transitions."""
    frozen, kept = against(table, "frozen", loss_ratio), against(table, "kept", loss_ratio)
    rows = []
    for arm in table:
        by_place = zip(*(cell["loss_ratios"] for cell in table[arm]), strict=True)
        to_frozen, to_kept = shown(frozen, arm), shown(kept, arm)
        rows.append(
            {
                "arm": ARMS[arm].text,
                "mean, %": interval(of(table, arm, loss_ratio)).signed,
                "to frozen": to_frozen[0],
                "p": to_frozen[1],
                "to kept": to_kept[0],
                "p ": to_kept[1],
                "by transition, %": " ".join(f"{100 * (mean(ratios) - 1):+.0f}" for ratios in by_place),
            }
        )
    return as_markdown(rows)


def time_table(table: Table) -> str:
    """CPU time of an epoch, and what it took to reach the frozen arm's last validation mIoU of the same seed."""
    rows = []
    for arm, cells in table.items():
        reached = [reach(cell, final("validation")(other)) for cell, other in zip(cells, table["frozen"], strict=True)]
        steps, seconds = (median(one[part] for one in reached) for part in (0, 1))
        epochs = [cell["seconds"] for cell in cells]
        rows.append(
            {
                "arm": ARMS[arm].text,
                "s an epoch, first": f"{median(one[0] for one in epochs):.2f}",
                "last": f"{median(one[-1] for one in epochs):.2f}",
                "s in all": f"{median(sum(one) for one in epochs):.0f}",
                "reached by": f"{sum(one[0] < math.inf for one in reached)} of {len(cells)}",
                "steps to reach": f"{steps:.0f}" if steps < math.inf else "not reached",
                "s to reach": f"{seconds:.1f}" if seconds < math.inf else "not reached",
            }
        )
    return as_markdown(rows)


# What each pair holds apart; a pair is compared wherever both arms are there.
PAIRS = (
    ("cleared", "kept", "clearing the moments in place, beta2 0.999"),
    ("recreated_b99", "kept_b99", "re-creating AdamW, beta2 0.99"),
    ("kept_b99", "kept", "beta2 0.99 instead of 0.999, moments kept"),
    ("recreated_b99", "cleared", "beta2 0.99 instead of 0.999, moments forgotten"),
    ("guide", "norms_train", "forgetting, in the guide's own norm mode (under cosine the dead LR scheduler too)"),
    ("guide", "kept", "the guide's loop against this library's default"),
    ("norms_frozen", "kept", "norms frozen instead of batch statistics after joining"),
    ("norms_train", "kept", "norms of frozen blocks in training mode"),
    ("warmup", "kept", "warm-up of 20 steps"),
    ("layer_decay", "kept", "layer decay 0.8"),
    ("kept", "full_low", "the schedule against all blocks from the start, same norm mode"),
    ("norms_frozen", "full_low_norms_frozen", "the same with norms frozen"),
)


def pair_table(found: dict[tuple[int, str], Table]) -> str:
    """One difference a row, one kind of run a column; Holm over each column."""
    columns = {}
    for which, table in found.items():
        known = {pair[2]: comparison(table, *pair[:2], final("test")) for pair in PAIRS if {*pair[:2]} <= set(table)}
        adjusted = holm({what: one.p for what, one in known.items()})
        columns[which] = {what: (one, adjusted[what]) for what, one in known.items()}
    rows = []
    for first, second, what in PAIRS:
        row = {"what differs": what, "arms": f"{first} - {second}"}
        for which, column in columns.items():
            one, p = shown(column, what)
            row[titled(which, found[which])] = f"{one} (p {p})" if one else "-"
        rows.append(row)
    return as_markdown(rows)


def titled(which: tuple[int, str], table: Table) -> str:
    """What kind of run, and how many seeds."""
    cells = next(iter(table.values()))
    length = "short" if which[0] == EVALUATIONS else "long"
    return f"{length}, {which[0] * cells[0]['steps_per_epoch']:,} steps, {which[1]}, {len(cells)} {'seed' if len(cells) == 1 else 'seeds'}"


def verdicts(found: dict[tuple[int, str], Table]) -> str:
    """What is significant, and what is not, in words."""
    lines = []
    for which, table in found.items():
        if len(next(iter(table.values()))) == 1:
            lines.append(f"- {titled(which, table)}: one seed says nothing about the next.")
            continue
        if "kept" in table:
            gain = comparison(table, "kept", "frozen", final("test"))
            low, high = gain.mean - gain.half, gain.mean + gain.half
            where = "below all of it" if high < 3 else "above all of it" if low > 8 else "not told apart from it"
            lines.append(
                f"- {titled(which, table)}: the guide expects +3 to +8 points over the frozen baseline; the schedule gives "
                f"{gain.signed} on the test part, {where}."
            )
        for reference in ("frozen", "kept"):
            columns = {part: (measure, "points") for part, measure in PARTS.items()}
            columns["loss after transitions (lower is better)"] = (loss_ratio, "%")
            for part, (measure, unit) in columns.items():
                column = against(table, reference, measure)
                if not column:
                    continue
                sure = [
                    f"{ARMS[arm].text.removeprefix('... ')} ({one.signed})"
                    for arm, (one, p) in column.items()
                    if p < LEVEL
                ]
                widest = max(one.half for one, _ in column.values())
                lines.append(
                    f"- {titled(which, table)}, {part} against *{ARMS[reference].text}*: "
                    + (f"significant: {'; '.join(sure)}. " if sure else "nothing is significant. ")
                    + f"{len(column) - len(sure)} of {len(column)} comparisons are not; the widest interval is "
                    f"± {widest:.1f} {unit}."
                )
    return "\n".join(lines)


ALTERNATIVES = {
    "cleared": "moments are kept",
    "norms_frozen": '`norms="eval"`, not `"frozen"`',
    "norms_train": '`norms="eval"`, not `"train"`',
    "warmup": "`warmup_steps=0`, not 20",
    "layer_decay": "`layer_decay=1`, not 0.8",
}


def defaults(found: dict[tuple[int, str], Table]) -> str:
    """Where an alternative to one of the library's defaults is significantly better or worse than it."""
    better: dict[str, list[str]] = {arm: [] for arm in ALTERNATIVES}
    worse: dict[str, list[str]] = {arm: [] for arm in ALTERNATIVES}
    for which, table in found.items():
        for part, measure in {"validation": final("validation"), **PARTS}.items():
            for arm, (one, p) in against(table, "kept", measure).items():
                if arm in ALTERNATIVES and p < LEVEL:
                    side = better if one.mean > 0 else worse
                    side[arm].append(f"{titled(which, table)}, {part} ({one.signed})")
    return "\n".join(
        f"- {default}: the other is significantly better {'; '.join(better[arm]) or 'nowhere'}, "
        f"worse {'; '.join(worse[arm]) or 'nowhere'}."
        for arm, default in ALTERNATIVES.items()
    )


def choices_text(choices: dict[str, Any]) -> str:
    """The choices, with what they were read off."""
    words = {
        "lr": "Learning rate of decoder and head, by the frozen arm",
        "full_lr": "The one learning rate of full fine-tuning",
        "scale": "Scale of the encoder's rate in all other arms, by kept and cleared together",
    }
    lines = []
    for name, what in words.items():
        read = choices.get("tables", {}).get(name, {})
        text = ", ".join(f"{value}: {100 * score:.1f} %" for value, score in read.items())
        lines.append(f"- {what}: **{choices[name]:g}**" + (f" ({text})" if text else " (fixed)"))
    return "\n".join(lines)


def write(result: dict[str, Any], output: Path) -> None:
    """Write `unfreezing.json`; `.md` and `.png` where at least one seed is complete."""
    write_json(result, output / "unfreezing.json")
    found = tables(result["cells"], result["arms"])
    if not found:
        print("no seed is complete yet")
        return
    from unfreezing_plot import draw  # noqa: PLC0415  # matplotlib is slow to import, and not needed without a table

    draw(found, output / "unfreezing.png")
    text = TEXT.format(
        state=state(result, found),
        choices=choices_text(result["choices"]),
        versions=", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        commits=", ".join(sorted({cell["commit"][:12] for cell in result["cells"]})),
        verdicts=verdicts(found),
        defaults=defaults(found),
        pairs=pair_table(found),
        sections="\n".join(section(which, table) for which, table in found.items()),
    )
    (output / "unfreezing.md").write_text(text)
    print(text)


def state(result: dict[str, Any], found: dict[tuple[int, str], Table]) -> str:
    """How far the planned table has come."""
    kinds = {(epochs, schedule) for epochs in (10, 80) for schedule in ("cosine", "constant")}
    done = {kind: len(next(iter(found[kind].values()))) if kind in found else 0 for kind in kinds}
    names = {
        kind: f"{'short' if kind[0] == EVALUATIONS else 'long'} {kind[1]} {number}" for kind, number in done.items()
    }
    return f"Complete seeds of {result['planned_seeds']} planned: {', '.join(sorted(names.values(), reverse=True))}."


def section(which: tuple[int, str], table: Table) -> str:
    """All tables of one length and LR schedule."""
    title = titled(which, table)
    return f"""## {title[0].upper()}{title[1:]}

mIoU in percent at the end. Bold: significant.

{main_table(table)}

On the shifted test part.

{shift_table(table)}

Points of test mIoU gained in each phase, named by the numbers of blocks that train in it under the schedule; each is a
fifth of the steps. The guide names five phases; that they are these is our reading.

{phase_table(table)}

Loss of the 20 steps after a transition against the 20 before. Arms without transitions are measured at the same steps:
the loss falls anyway.

{loss_table(table)}

CPU time on one thread, on a shared machine, and what it took to reach the frozen arm's last validation mIoU (medians).

{time_table(table)}
"""


TEXT = """# What unfreezing buys

`python benchmarks/study/unfreezing.py` (`--quick` for a look; a second call goes on where the first stopped, this file's cells
included). Written by the script; losing results stand as they are.

{state}

{versions}; library at {commits}.

## How

The embedded sample at 64 pixels, batches of 8; a fifth of its training part validates, split by seed as in the training
command. Unet with `tu-tf_efficientnet_lite0` and ImageNet weights, 7 blocks, AdamW. Supervised, without a teacher: its
forward pass would double the price of a frozen phase, and none of these questions needs it. An epoch is 160 images (20
steps) drawn anew from the 320. Short runs have 10 epochs, a first block at epoch 2, one more each epoch; long runs 80, 16
and 8: the proportions of the guide's 50, 10 and 5. All arms of a seed see the same images in the same order, and start
from the same weights.

Chosen on the validation part alone, under cosine in short runs, with two seeds that the tables do not use (mean
validation mIoU in brackets), then used for all lengths and LR schedules:

{choices}

The decoder's width was settled before that on the frozen arm of the same two seeds, since a narrower one left out whole
classes on the validation part; the console of those runs also showed test figures. The candidate 0.01 was added when the
first four seeds of the short cosine table were there, so that no choice lies at the upper edge; it changed none.

Noise (0.1 of [0, 1]) and blur (1 pixel) of the shifted test part were set once, before any run.

*The guide's loop as printed* makes a new AdamW at each transition, whose rates its LR scheduler, bound to the first one,
never sees, and leaves norms in training mode. Its decoder parameters lack the segmentation head, which is a slip; the
head is added here, so that the comparison is not about that. *Cleared in place* equals re-creating AdamW with the LR
schedule carried over, to the bit (a test holds it), so one arm stands for both: what costs or helps is the forgetting.

Means and paired differences with 95 % confidence intervals (Student's t over seeds, ± half the width); n is in the
headings. p values are corrected by Holm over each column of a table, so that 5 % is the risk of one false claim a
column, not over all columns. Only seeds of which every arm is finished are counted.

## What is significant

{verdicts}

## The library's defaults

A default gives way to an alternative that is significantly better on the validation part (nothing is chosen on the test
part) of every table that has both, and worse nowhere: a default has to do for all kinds of runs. What is better in some
is an option, and the guide to the presets says so. Long runs have no arms for norms, warm-up and layer decay.

{defaults}

## Moments kept or forgotten, and the other knobs

Differences of test mIoU in points, paired by seed.

{pairs}

![plots](unfreezing.png)

{sections}"""
