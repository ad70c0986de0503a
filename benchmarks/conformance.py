"""The conformance table: optimizers and LR schedulers x ways to let parameters join, from real runs.

    python benchmarks/conformance.py [--quick] [--output FOLDER]

Beside the library, late and declared, stand a bare `add_param_group`, re-creating the optimizer, and Lightning's
`unfreeze_and_add_param_group`, each given the right learning rate. The runs themselves are
those of `tests/conformance`.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import warnings
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "conformance"), str(HERE / "speed")]

import optimizers_matrix as optimizers  # noqa: E402  # from the folders above
import schedulers_matrix as schedulers  # noqa: E402  # likewise
from measuring import RESULTS, as_markdown  # noqa: E402  # likewise

PACKAGES = ("torch", "timm", "transformers", "schedulefree", "prodigyopt", "lion-pytorch", "pytorch-optimizer",
            "accelerate", "lightning", "unfreeze-sched")  # fmt: skip
SCALE = 0.5


def peer_arm(case: optimizers.Case, way: str) -> optimizers.Arm:
    """The run in which blocks join by one of the common ways; one that was there already stays."""
    net = optimizers.net_of(case)
    blocks = list(reversed(net.blocks))
    reached: list[int] = []

    def groups(number: int) -> optimizers.Groups:
        joined = [optimizers.group_of(block, optimizers.LR * SCALE) for block in blocks[:number]]
        return [optimizers.group_of(net.head, optimizers.LR), *joined]

    def join(live: list[Any], number: int) -> None:
        new = [index for index in range(number) if index not in reached]
        reached.extend(new)
        if way == "re-creating the optimizer":
            live[:] = [optimizers.made(case, groups(number))]
        for index in new if way == "bare add_param_group" else []:
            live[0].add_param_group(optimizers.group_of(blocks[index], optimizers.LR * SCALE))
        for index in new if way == "Lightning's" else []:
            lightning_join(blocks[index], live[0])

    return optimizers.Arm(net, [optimizers.made(case, groups(0))], join)


def lightning_join(block: nn.Module, optimizer: Any) -> None:
    from lightning.pytorch.callbacks import BaseFinetuning  # noqa: PLC0415  # for this column alone

    BaseFinetuning.unfreeze_and_add_param_group(block, optimizer, initial_denom_lr=1 / SCALE)


def peer_verdict(case: optimizers.Case, way: str) -> str:
    """What becomes of an optimizer's run by one of the common ways."""
    try:
        with optimizers.surroundings(case):
            worst = optimizers.deviation(case, peer_arm(case, way), optimizers.target_arm(case, SCALE))
    except Exception as error:  # noqa: BLE001  # one broken cell is a cell of the table
        return f"crashes: {type(error).__name__}"
    if worst == 0:
        return "bit-exact"
    return "within 1e-12" if worst <= 1e-12 else f"wrong: {min(worst, 1.0):.0e} off"


def optimizer_rows(*, quick: bool) -> list[dict[str, str]]:
    """One row an optimizer; of the scales tried, the cell shows the worst that was not refused for its scale alone."""
    rows = []
    cases = {case.name: case for case in optimizers.cases()}
    for name, group in groupby(optimizers.rows(quick), key=lambda row: str(row["optimizer"])):
        tried = list(group)
        row = {"optimizer": name, "compared with": tried[0]["target"]}
        for membership in optimizers.MEMBERSHIPS:
            said = {str(r["scale"]): str(r["verdict"]) for r in tried if r["membership"] == membership}
            row[membership] = summary(said)
        for way in ("bare add_param_group", "re-creating the optimizer", "Lightning's"):
            row[way] = peer_verdict(cases[name], way)
        rows.append(row)
    return rows


def summary(said: dict[str, str]) -> str:
    """One cell of the verdicts at several scales."""
    for worst in ("failing", "within"):
        found = [text for text in said.values() if text.startswith(worst)]
        if found:
            return found[0]
    refused = {scale: short(text) for scale, text in said.items() if text.startswith("refused")}
    if not refused:
        return "bit-exact"
    reason = next(iter(refused.values()))
    return reason if len(refused) == len(said) else f"bit-exact at scale 1, else {reason}"


def short(refusal: str) -> str:
    """A refusal's reason, without the fix and the numbers of this run."""
    return re.sub(
        r", got (a group at|membership|on_refreeze)[^;]*", "", refusal.split(";", maxsplit=1)[0].replace("|", "/")
    )


def counts(rows: list[dict[str, str]]) -> str:
    """How many rows of each column have which kind of verdict."""
    lines = []
    for column in ("late", "declared", "bare add_param_group", "re-creating the optimizer", "Lightning's"):
        kinds = [re.split(r"[: ]", row[column])[0].lower() for row in rows]
        told = {"bit-exact": "bit-exact", "within": "within 1e-12", "refused": "refused", "failing": "failing",
                "wrong": "wrong", "crashes": "crashing"}  # fmt: skip
        lines.append(f"- {column}: " + ", ".join(f"{kinds.count(k)} {v}" for k, v in told.items() if k in kinds))
    return "\n".join(lines)


def main() -> None:
    """Run everything and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one scale an optimizer, every fourth scheduler")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for conformance.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_schedulers, of_optimizers = schedulers.rows(quick=args.quick), optimizer_rows(quick=args.quick)
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    text = f"""# Conformance

Made by `python benchmarks/conformance.py`. A cell says how a run in which parameters join late differs from the run in
which they had been in the optimizer from the start, frozen: not in a bit, by rounding, or by how much. `refused` cells
raise an error that names the way out; for the library `failing` would be a defect, and there is none.

{", ".join(f"{name} {number}" for name, number in versions.items())}

## LR schedulers

A group joins before step 5 at a tenth of the head's learning rate, {schedulers.STEPS} steps in all; compared are the
rates, momenta and the schedulers' own states, for the common ways the rates alone.

{counts(of_schedulers)}

{as_markdown(of_schedulers)}

## Optimizers

Two blocks join, one is frozen again and thaws, at the template's learning rate and at half of it; compared are weights
and states of all parameters. Where an optimizer counts its steps by group, the run from the start is the wrong target,
since its count would have run while the parameters were frozen: such rows are compared with a *fresh* optimizer of the
joining parameters, or, where all parameters are coupled, with the run from the start whose counts were *reset*.

{counts(of_optimizers)}

{as_markdown(of_optimizers)}
"""
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "conformance.md").write_text(text)
    content = {"versions": versions, "schedulers": of_schedulers, "optimizers": of_optimizers}
    (args.output / "conformance.json").write_text(json.dumps(content, indent=1) + "\n")
    print(counts(of_schedulers), counts(of_optimizers), sep="\n\n")


if __name__ == "__main__":
    main()
