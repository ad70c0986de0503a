"""What the timing scripts share: arms in turn, medians and spreads, what was measured on, and the three files."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; one value has no range."""
        if len(values) == 1:
            return cls(values[0], 0.0, 1)
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), high - low, len(values))

    def scaled(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.median * factor, self.iqr * factor, self.repeats)

    def show(self, digits: int = 3) -> str:
        """Median and range in one cell."""
        return f"{self.median:,.{digits}f} ({self.iqr:,.{digits}f})"


def ratio(values: Sequence[float], to: Sequence[float]) -> Spread:
    """Of ratios within one round each: what slows the machine down slows both."""
    return Spread.of([value / other for value, other in zip(values, to, strict=True)])


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection within, as in `timeit`."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def in_turn(arms: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """One value of each arm a round; every other round goes backwards, so that no arm is always the first."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        for name in list(arms)[:: -1 if index % 2 else 1]:
            found[name].append(arms[name]())
    return found


def parse(doc: str | None, argv: Sequence[str] | None, device: str | None = None) -> argparse.Namespace:
    """The arguments that all scripts have, and `--device` for one that has a default of it."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: whether it runs, not how fast")
    parser.add_argument("--output", type=Path, help="folder for the files (default: results; quick: runs/quick)")
    if device is not None:
        parser.add_argument("--device", default=device, help=f"default: {device}; another one is a look, as --quick is")
    args = parser.parse_args(argv)
    # A look must not overwrite what is published.
    is_look = args.quick or (device is not None and args.device != device)
    args.output = args.output or (Path("runs/quick") if is_look else RESULTS)
    return args


def surroundings(*packages: str) -> dict[str, Any]:
    """What the figures depend on."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("torch", "unfreeze-sched", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return {
        **found,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load at the end": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def plain(value: Any) -> Any:
    """Spreads as JSON has them."""
    if isinstance(value, Spread):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def verdict(value: float, limit: float, *, at_least: bool = False) -> str:
    """Whether a target is met, in a word."""
    return "met" if (value >= limit if at_least else value <= limit) else "**missed**"


def as_markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table of rows with equal keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(
    name: str, output: Path, result: Mapping[str, Any], text: str, draw: Callable[[Any], None] | None = None
) -> None:
    """Write `name.json`, `name.md` and, with `draw`, `name.png`, and print the text.

    Args:
        name: Of the script.
        output: Folder; made if it is not there.
        result: Numbers, with `versions`.
        text: Markdown, to which the versions are added.
        draw: Draws on a figure of matplotlib.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(plain(result), indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
    picture = f"\n![]({name}.png)\n" if draw else ""
    text = f"{text.rstrip()}\n\n{versions}\n{picture}"
    (output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    if draw:
        import matplotlib as mpl  # noqa: PLC0415  # slow to import, and needed at the end alone

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415  # likewise

        figure = plt.figure(figsize=(11, 4.5), layout="constrained")
        draw(figure)
        figure.savefig(output / f"{name}.png", dpi=110)
        plt.close(figure)
