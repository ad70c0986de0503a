"""What a transition and a step cost on a GPU, and what a phase takes of its memory beside what was planned.

    python benchmarks/speed/gpu.py [--device NAME] [--quick] [--output FOLDER]

The arms of a transition are those of `transition.py`, asserted to make the same groups; those of a step are those of
`step_cost.py`, asserted to make the same one to the bit. Times are of the clock on the wall, from an idle device until
it is idle again, so that they hold what the processor does and what it waits for. `--device cpu` tries the script where
there is no GPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import Spread, as_markdown, in_turn, no_collection, parse, ratio, surroundings, write
from networks import Training, split, unet, vit
from step_cost import IMPLEMENTATIONS, REFERENCE, Arm, arms, assert_equal_steps
from transition_arms import ARMS, FLOOR, Network, Setting, agreeing

from unfreeze_sched import ProgressiveUnfreezer, RatePreset, UnfreezeSchedule
from unfreeze_sched.plan.memory import measure
from unfreeze_sched.plan.phases import make_plan

WAYS = (
    *(FLOOR, "apply, late", "apply, declared", "sync, late", "apply, nothing to do"),
    *("re-creating AdamW", "re-creating, state by load_state_dict"),
)


def clocked(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, until the device has done what it asked for."""
    wait: Callable[[], object] = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    with no_collection():
        wait()
        begin = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begin


def transitions(network: Network, device: str, rounds: int) -> dict[str, dict[str, Spread]]:
    """Milliseconds of each way to let all blocks join AdamW, and how many times the floor's that is."""
    # As of a network so large that the peers are left out whose time grows with the square.
    assert set(WAYS) <= set(agreeing(network, 10**9)), "arms differ"

    def one(name: str) -> float:
        setting = Setting.of(network, ARMS[name])
        return clocked(ARMS[name].make(setting), device) / ARMS[name].calls

    times = in_turn({name: lambda name=name: one(name) for name in WAYS}, rounds)  # type: ignore[misc]
    return {
        name: {"ms": Spread.of(found).scaled(1e3), "ratio": ratio(found, times[FLOOR])} for name, found in times.items()
    }


def steps(training: Training, device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each implementation of AdamW, phase and arm: the optimizer's step, and the whole one."""
    total, rows = len(training.network.blocks), []

    def whole(arm: Arm) -> None:
        arm.optimizer.zero_grad()
        training.backward()
        arm.optimizer.step()

    for implementation in ("foreach", "fused"):
        for phase, number in (("before", 0), ("between", total // 2), ("after", total)):
            training.model.train()
            found = arms(training, number, IMPLEMENTATIONS[implementation])
            assert_equal_steps(training, found)
            times = [
                # The gradients of the assertion are still there.
                in_turn({n: lambda arm=arm: clocked(arm.optimizer.step, device) for n, arm in found.items()}, rounds),  # type: ignore[misc]
                in_turn({n: lambda arm=arm: clocked(lambda: whole(arm), device) for n, arm in found.items()}, rounds),  # type: ignore[misc]
            ]
            rows += [
                {
                    "implementation": implementation,
                    "phase": f"{phase}, {number} blocks",
                    "arm": name,
                    "groups": len(arm.optimizer.param_groups),
                    "optimizer, ms": Spread.of(times[0][name]).scaled(1e3),
                    "optimizer, ratio": ratio(times[0][name], times[0][REFERENCE]),
                    "step, ms": Spread.of(times[1][name]).scaled(1e3),
                    "step, ratio": ratio(times[1][name], times[1][REFERENCE]),
                }
                for name, arm in found.items()
            ]
            for parameter in training.model.parameters():
                parameter.grad = None
    return rows


def memory(name: str, image_size: int, batch_size: int, device: str) -> list[dict[str, int]]:
    """Bytes in each phase of a Unet: planned, kept where a forward pass has ended, and the peak of whole steps.

    A phase keeps most when a forward pass has ended: weights, gradients, states and what is saved for backward.
    """
    import segmentation_models_pytorch as smp  # noqa: PLC0415  # slow to import

    measured = measure(name, (image_size, image_size), batch_size, "adamw", "eval")
    total = len(measured.parts) - 1
    preset = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=total, total_epochs=total + 1)
    plan = make_plan(schedule, 1e-3, measured=measured)

    gc.collect()
    torch.eye(8, device=device) @ torch.eye(8, device=device)  # cuBLAS keeps a workspace from its first product on
    before = torch.cuda.memory_allocated(device)
    model = smp.Unet(name, encoder_weights=None).to(device)
    network = split(model)
    optimizer = torch.optim.AdamW(network.head, fused=True)
    unfreezer = ProgressiveUnfreezer(network.blocks, optimizer, schedule, None)
    images, rows = torch.randn(batch_size, 3, image_size, image_size, device=device), []
    for phase in plan.phases:
        unfreezer.apply(phase.first_epoch)
        model.train()
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(2):  # the first makes the states of what has joined
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        peak = torch.cuda.max_memory_allocated(device) - before
        loss = model(images).square().mean()
        kept = torch.cuda.memory_allocated(device) - before
        del loss
        assert phase.memory is not None
        rows.append({"blocks": phase.unfrozen, "planned": phase.memory.total, "kept": kept, "peak": peak})
    return rows


def text_of(
    ways: dict[str, dict[str, dict[str, Spread]]],
    rows: dict[str, list[dict[str, Any]]],
    phases: dict[str, list[dict[str, int]]],
) -> str:
    """The tables."""
    parts = [
        "# On a GPU",
        "Made by `python benchmarks/speed/gpu.py`, whose head says how. Medians, interquartile ranges in brackets.",
        "## A transition",
        "The floor is a bare `add_param_group`, which neither sets `requires_grad` nor tells the scheduler.",
    ]
    for name, found in ways.items():
        table = [
            {
                "arm": arm,
                "ms": row["ms"].show(4),
                "over the floor": row["ratio"].show(2) if arm != "apply, nothing to do" else "-",
            }
            for arm, row in found.items()
        ]
        parts += [f"### {name}", as_markdown(table)]
    parts += ["## A step", f"`{REFERENCE}` has no hook and no group of the library's; `late` and `declared` have both."]
    for name, own in rows.items():
        table = [
            {
                "AdamW": row["implementation"],
                **{key: row[key] for key in ("phase", "arm", "groups")},
                "optimizer, ms": row["optimizer, ms"].show(3),
                "over built at once": row["optimizer, ratio"].show(3),
                "a whole step, ms": row["step, ms"].show(2),
                "it over built at once": row["step, ratio"].show(3),
            }
            for row in own
        ]
        parts += [f"### {name}", as_markdown(table)]
    if phases:
        parts += [
            "## Memory",
            "MiB. Planned and kept: when a forward pass has ended. The peak is that of whole steps, temporaries included.",
        ]
    for name, sizes in phases.items():
        table = [
            {
                "blocks": str(size["blocks"]),
                **{key: f"{size[key] / 2**20:.1f}" for key in ("planned", "kept", "peak")},
                **{f"{key} over planned": f"{size[key] / size['planned']:.3f}" for key in ("kept", "peak")},
            }
            for size in sizes
        ]
        parts += [f"### {name}", as_markdown(table)]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write the tables."""
    args = parse(__doc__, argv, device="cuda")
    device, on_cuda = args.device, torch.device(args.device).type == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise SystemExit(f"`--device` must be one of this machine, got {device}; --quick --device cpu tries the script")
    torch.manual_seed(0)
    began = time.perf_counter()
    trainings: dict[str, Callable[[], Training]]
    if args.quick:
        sizes = {200: 3}
        trainings = {"efficientnet-b0 Unet, 32 pixels, batch 2": lambda: Training.of(unet(), 32, 2, device)}
    else:
        sizes = {2_000: 31, 20_000: 7}
        trainings = {
            "efficientnet-b0 Unet, 224 pixels, batch 16": lambda: Training.of(unet(), 224, 16, device),
            "ViT-B, 224 pixels, batch 8": lambda: Training.of(vit(), 224, 8, device),
        }
    ways, rows = {}, {}
    for size, rounds in sizes.items():
        ways[f"{size:,} tensors, half of them joining"] = transitions(Network.of(size, device), device, rounds)
    for name, make in trainings.items():
        training = make()
        ways[name] = transitions(training.network, device, 3 if args.quick else 15)
        rows[name] = steps(training, device, 3 if args.quick else 11)
        del training
    planned = ("resnet18", 32, 2) if args.quick else ("tu-efficientnet_b0", 224, 8)
    phases = (
        {f"{planned[0]} Unet, {planned[1]} pixels, batch {planned[2]}": memory(*planned, device)} if on_cuda else {}
    )
    versions = {
        "card": torch.cuda.get_device_name(device) if on_cuda else "none",
        "CUDA": torch.version.cuda,
        **surroundings("timm", "segmentation-models-pytorch"),
        "seconds in all": round(time.perf_counter() - began),
    }
    result = {"versions": versions, "transitions": ways, "steps": rows, "memory": phases}
    write("gpu", args.output, result, text_of(ways, rows, phases))


if __name__ == "__main__":
    main()
