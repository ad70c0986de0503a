"""Time and memory of a training step by the number of unfrozen blocks, beside what `unfreeze-sched plan` predicts.

    python benchmarks/speed/phases.py [--quick] [--output FOLDER]

Each phase is brought about by `ProgressiveUnfreezer.apply`; AdamW (fused), binary cross-entropy on random targets. The
phases take turns, a whole step each. Memory is measured in a step of its own: activations are the storages that autograd
saves, weights and buffers left out; gradients and optimizer state are the tensors that are there after the step; the
peak is what the allocator had out at once within the step, with the optimizer state that was there when it began. The
frozen phase is compared with a loop written by hand, in which the encoder runs under `torch.no_grad()` with its norms in
evaluation mode; the gradients are asserted equal to the bit. Times are processor time of one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import Spread, as_markdown, in_turn, no_collection, parse, ratio, surroundings, write
from networks import Training
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from unfreeze_sched import MilestonePreset, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.model.freezing import norms_of
from unfreeze_sched.plan.memory import measure as planned
from unfreeze_sched.plan.phases import Measured, make_plan

LR = 1e-5
MIB = 2**20


def built(name: str, image_size: int) -> nn.Module:
    """What `unfreeze-sched plan` builds by the same name, with weights."""
    import segmentation_models_pytorch as smp  # noqa: PLC0415  # slow to import
    import timm  # noqa: PLC0415  # likewise

    if name.startswith("vit"):
        return timm.create_model(name, img_size=image_size)  # type: ignore[no-any-return]
    return smp.Unet(name, encoder_weights=None)  # type: ignore[no-any-return]


class Run:
    """A network in one phase after the other, with an optimizer for each that has gone through all phases before it."""

    @classmethod
    def of(cls, name: str, image_size: int, batch_size: int) -> Run:
        """A real network."""
        return cls(Training.of(built(name, image_size), image_size, batch_size))

    def __init__(self, training: Training) -> None:
        self.training = training
        self.network = training.network
        self.total = len(self.network.blocks)
        self.schedule = UnfreezeSchedule(
            preset=MilestonePreset(milestones={n: n for n in range(1, self.total + 1)}),
            total_blocks=self.total,
            total_epochs=self.total + 1,
        )
        self.optimizer: Optimizer = AdamW(self.network.head, lr=LR, fused=True)
        self.unfreezer = ProgressiveUnfreezer(self.network.blocks, self.optimizer, self.schedule, None)

    def enter(self, number: int) -> None:
        """Go to the phase with so many unfrozen blocks; forward or back."""
        self.optimizer.zero_grad()
        self.unfreezer.apply(number)
        self.training.model.train()

    def step(self) -> float:
        """Seconds of a whole step."""
        with no_collection():
            begin = time.process_time()
            self.optimizer.zero_grad()
            self.training.backward()
            self.optimizer.step()
            return time.process_time() - begin

    def memory(self) -> dict[str, int]:
        """Bytes of one step."""
        model = self.training.model
        seen = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        kept: list[Any] = []  # alive, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                kept.append(tensor.untyped_storage())
            return tensor

        self.optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(self.training.images)
        activations = sum(storage.nbytes() for storage in kept)
        kept.clear()
        del logits
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.training.backward()
            self.optimizer.step()
        state = _bytes(value for state in self.optimizer.state.values() for value in state.values())
        return {
            "activations": activations,
            "gradients": _bytes(p.grad for p in model.parameters()),
            "optimizer": state,
            "peak": state + _peak(found),
        }


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _peak(found: Any) -> int:
    live = peak = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def by_phase(run: Run, plan: Measured, rounds: int) -> list[dict[str, Any]]:
    """One row a phase."""
    memory = []
    for number in range(run.total + 1):  # forward, so that the state of each phase is what a run has there
        run.enter(number)
        run.step()
        memory.append(run.memory())

    def timed(number: int) -> float:
        run.enter(number)
        return run.step()

    numbers = range(run.total + 1)
    times = in_turn({str(n): lambda n=n: timed(n) for n in numbers}, rounds)  # type: ignore[misc]
    predicted = [phase.memory for phase in make_plan(run.schedule, LR, measured=plan).phases]
    rows = []
    for number, measured, told in zip(numbers, memory, predicted, strict=True):
        assert told is not None
        rows.append(
            {
                "blocks": number,
                "step, ms": Spread.of(times[str(number)]).scaled(1e3),
                "ratio": ratio(times[str(number)], times[str(run.total)]),
                "measured": measured,
                "predicted": {key: getattr(told, key) for key in ("activations", "gradients", "optimizer")},
            }
        )
    return rows


def by_hand(run: Run) -> Callable[[], Tensor]:
    """Forward and loss of a loop that knows the encoder to be frozen."""
    model: Any = run.training.model
    images = run.training.images

    def loss() -> Tensor:
        if hasattr(model, "encoder"):
            with torch.no_grad():
                features = model.encoder(images)
            return run.training.loss(model.segmentation_head(model.decoder(features)))
        with torch.no_grad():
            features = model.forward_features(images)
        return run.training.loss(model.forward_head(features))

    return loss


def frozen(run: Run, rounds: int) -> dict[str, Any]:
    """The frozen phase against the loop by hand, on two optimizers of the same head."""
    run.enter(0)
    model, head = run.training.model, run.network.head
    norms = [module for block in run.network.blocks for module in norms_of(block)]
    loss = by_hand(run)
    other = AdamW(head, lr=LR, fused=True)

    def backward() -> None:
        loss().backward()  # type: ignore[no-untyped-call]

    gradients = []
    for call in (run.training.backward, backward):
        for parameter in model.parameters():
            parameter.grad = None
        torch.manual_seed(0)
        call()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None), "another parameter has a gradient"
        assert one is None or torch.equal(one, two), "gradients differ"

    def hand() -> float:
        with no_collection():
            begin = time.process_time()
            other.zero_grad()
            backward()
            other.step()
            return time.process_time() - begin

    assert not any(module.training for module in norms)
    times = in_turn({"by hand": hand, "library": run.step}, rounds)
    return {
        "by hand, ms": Spread.of(times["by hand"]).scaled(1e3),
        "library, ms": Spread.of(times["library"]).scaled(1e3),
        "ratio": ratio(times["library"], times["by hand"]),
    }


def text_of(rows: dict[str, list[dict[str, Any]]], alone: dict[str, dict[str, Any]]) -> str:
    """Targets and tables."""
    goals = []
    for name, found in alone.items():
        spread = found["ratio"]
        low, high = spread.median - spread.iqr / 2, spread.median + spread.iqr / 2
        word = "met" if spread.median <= 1 else ("**missed**" if low > 1 else "met within the noise, not in the median")
        goals.append(
            {
                "target": f"{name}: the frozen phase costs no more than a loop by hand",
                "measured": f"{spread.show(3)} of it (about {low:.3f} to {high:.3f}): {found['library, ms'].show(1)} "
                f"against {found['by hand, ms'].show(1)} ms",
                "": word,
            }
        )
    parts = [
        "# Time and memory by phase",
        (
            "Made by `python benchmarks/speed/phases.py`, whose head says how. Medians, interquartile ranges in brackets; memory in "
            "MiB, measured / predicted by `unfreeze-sched plan`. The sizes are what two cores can do; the shares depend on "
            "them little."
        ),
        "## Targets",
        as_markdown(goals),
    ]
    for name, own in rows.items():
        first, last = own[0], own[-1]
        sums = [sum(row[side][key] for key in row["predicted"]) for row in (first, last) for side in ("measured",)]
        parts += [
            f"## {name}",
            (
                f"With the encoder frozen a step takes {first['ratio'].median:.0%} of the time of one with all blocks unfrozen, "
                f"and keeps {sums[0] / sums[1]:.0%} of the memory (weights aside), {first['measured']['peak'] / last['measured']['peak']:.0%} "
                "at its peak."
            ),
            as_markdown([_cells(row) for row in own]),
        ]
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    measured, predicted = row["measured"], row["predicted"]
    total, told = sum(measured[key] for key in predicted), sum(predicted.values())

    def both(one: int, two: int) -> str:
        return f"{one / MIB:,.1f} / {two / MIB:,.1f}"

    return {
        "unfrozen": str(row["blocks"]),
        "step, ms": row["step, ms"].show(1),
        "of all unfrozen": row["ratio"].show(2),
        **{key: both(measured[key], predicted[key]) for key in predicted},
        "sum": both(total, told),
        "off": f"{100 * (told / total - 1):+.1f} %",
        "peak of a step": f"{measured['peak'] / MIB:,.1f}",
    }


def draw(rows: dict[str, list[dict[str, Any]]]) -> Callable[[Any], None]:
    """Time and memory over the number of unfrozen blocks."""

    def on(figure: Any) -> None:
        axes = figure.subplots(1, 2 * len(rows), squeeze=False)[0]
        for index, (name, own) in enumerate(rows.items()):
            numbers = [row["blocks"] for row in own]
            times, memory = axes[2 * index : 2 * index + 2]
            times.errorbar(
                numbers,
                [row["step, ms"].median for row in own],
                [row["step, ms"].iqr / 2 for row in own],
                marker="o",
                markersize=3,
                capsize=2,
            )
            times.set(title=name, xlabel="unfrozen blocks", ylabel="ms a step", ylim=(0, None))
            times.title.set_fontsize(8)
            below = [0.0] * len(own)
            for key in ("activations", "gradients", "optimizer"):
                values = [row["measured"][key] / MIB for row in own]
                memory.bar(numbers, values, bottom=below, label=key)
                below = [a + b for a, b in zip(below, values, strict=True)]
            told = [sum(row["predicted"].values()) / MIB for row in own]
            memory.plot(numbers, told, "k.", label="predicted")
            memory.plot(numbers, [row["measured"]["peak"] / MIB for row in own], "k_", label="peak of a step")
            memory.set(xlabel="unfrozen blocks", ylabel="MiB")
            memory.legend(fontsize=6)

    return on


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the table."""
    args = parse(__doc__, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    began = time.perf_counter()
    cases = [("timm-efficientnet-b0", "efficientnet-b0 Unet", 128, 4, 9), ("vit_base_patch16_224", "ViT-B", 224, 1, 5)]
    if args.quick:
        cases = [("timm-efficientnet-b0", "efficientnet-b0 Unet", 32, 2, 2)]
    rows, alone = {}, {}
    for encoder, title, size, batch, rounds in cases:
        name = f"{title}, {size} pixels, batch {batch}"
        run = Run.of(encoder, size, batch)
        rows[name] = by_phase(run, planned(encoder, (size, size), batch, "adamw", "eval"), rounds)
        alone[name] = frozen(run, 3 * rounds)
        del run
    versions = {
        **surroundings("timm", "segmentation-models-pytorch"),
        "seconds in all": round(time.perf_counter() - began),
    }
    result = {"versions": versions, "rows": rows, "frozen": alone}
    write("phases", args.output, result, text_of(rows, alone), draw(rows))


if __name__ == "__main__":
    main()
