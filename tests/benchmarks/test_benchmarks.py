"""The timing scripts: their arms agree, what they call equal can differ, and each runs with `--quick`."""

import json
from pathlib import Path

import gpu
import measuring
import phases
import pytest
import step_cost
import torch
import transition
import transition_arms as arms
from networks import Training
from torch import Tensor, nn

from unfreeze_sched import Block

TORCHS = [name for name, arm in arms.ARMS.items() if arm.is_there and arm.optimizer is arms.adamw]


def small() -> Training:
    """Two blocks, one with a norm, and a head."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    blocks = (Block("first", (model[0],)), Block("second", (model[1],)))
    network = arms.Network(list(model[2].parameters()), blocks)
    return Training(model, network, torch.randn(8, 4), torch.rand(8, 2))


@pytest.mark.parametrize("name", TORCHS)
def test_each_way_of_a_transition_makes_the_same_groups(name: str) -> None:
    """Parameters by identity, hyperparameters and rates are those of a bare add_param_group."""
    assert name in arms.agreeing(arms.Network.of(20))


def test_other_groups_do_not_agree() -> None:
    """Another rate, another parameter or another order is seen."""
    network = arms.Network.of(8)
    setting = arms.Setting.of(network, arms.ARMS[arms.FLOOR])
    arms.add_group(setting)()
    groups = arms.groups_of(setting.optimizer)
    for change in (
        lambda g: g.update(lr=g["lr"] * 1.001),
        lambda g: g["params"].reverse(),
        lambda g: g["params"].pop(),
    ):
        other = arms.Setting.of(network, arms.ARMS[arms.FLOOR])
        arms.add_group(other)()
        assert arms._close(groups, arms.groups_of(other.optimizer))
        change(other.optimizer.param_groups[1])
        assert not arms._close(groups, arms.groups_of(other.optimizer))


@pytest.mark.parametrize(
    ("name", "moments", "schedule"),
    [
        ("apply, late", "kept", "goes on"),
        ("apply, declared", "kept", "goes on"),
        ("sync, late", "kept", "goes on"),
        ("sync, declared", "kept", "goes on"),
        ("re-creating, state by reference", "kept", "goes on"),
        ("re-creating, state by load_state_dict", "kept", "goes on"),
        ("re-creating AdamW", "lost", "lost: drives the old optimizer"),
        (arms.FLOOR, "kept", "crashes: ValueError at step 101 of a period of 100"),
    ],
)
def test_what_survives_is_looked_up(name: str, moments: str, schedule: str) -> None:
    """Moments, step counts and the LR schedule after a transition, for the ways that are there without a peer."""
    found = arms.survival(arms.Network.of(8), arms.ARMS[name])
    assert (found["moments"], found["step counts"], found["LR schedule"]) == (moments, moments, schedule)
    assert found["joined"] == "4 of 4"
    assert found["tensor bytes, kept"] == "0"


def test_bytes_are_counted_while_they_are_alive() -> None:
    """Views count once, what is freed leaves the count, and what was there before never enters it."""
    before = torch.zeros(100)
    with arms.Allocations() as allocations:
        kept = torch.zeros(10)
        view = kept[2:]
        before.add_(1)
        gone = torch.zeros(20)
        del gone
    assert (allocations.live, allocations.peak) == (40, 120)
    del kept
    assert allocations.live == 40
    del view
    assert allocations.live == 0


@pytest.mark.parametrize("options", step_cost.IMPLEMENTATIONS.values(), ids=[*step_cost.IMPLEMENTATIONS])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_optimizer_makes_the_same_step(options: dict[str, bool], number: int) -> None:
    """Late, declared, merged and built at once: the same weights to the bit, in each phase and implementation."""
    training = small()
    found = step_cost.arms(training, number, options)
    assert len(found) == (4 if number else 3)
    step_cost.assert_equal_steps(training, found)


def test_another_step_is_noticed() -> None:
    """The comparison fails where one group's rate is another."""
    training = small()
    found = step_cost.arms(training, 1, {"foreach": True})
    found["declared"].optimizer.param_groups[1]["lr"] *= 1.5
    with pytest.raises(AssertionError, match="declared differs"):
        step_cost.assert_equal_steps(training, found)


def test_the_peak_is_that_of_live_bytes() -> None:
    """The allocator's events, summed in their order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        one = torch.ones(1000)
        two = torch.ones(2000)
        del one
        three = torch.ones(500)
        del two, three
    assert phases._peak(found) == 12_000


def test_the_frozen_phase_equals_a_loop_by_hand() -> None:
    """Gradients equal to the bit, or the comparison raises; here they are another function's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.segmentation_head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.bias = 0.0

        def forward(self, images: Tensor) -> Tensor:
            return self.segmentation_head(self.decoder(self.encoder(images))) + self.bias

    model = Net()
    network = arms.Network(
        [*model.decoder.parameters(), *model.segmentation_head.parameters()], (Block("encoder", (model.encoder,)),)
    )
    run = phases.Run(Training(model, network, torch.randn(8, 4), torch.rand(8, 2)))
    assert phases.frozen(run, 2)["ratio"].repeats == 2
    model.bias = 1.0
    with pytest.raises(AssertionError, match="gradients differ"):
        phases.frozen(run, 2)


def test_arms_take_turns() -> None:
    """Every other round goes backwards, and each arm has one value a round."""
    calls: list[str] = []

    def called(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = measuring.in_turn({name: lambda name=name: called(name) for name in "ab"}, 2)
    assert calls == ["a", "b", "b", "a"]
    assert found == {"a": [1.0, 4.0], "b": [2.0, 3.0]}
    assert measuring.ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == measuring.Spread(2.0, 1.0, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what the peers import
@pytest.mark.parametrize(("script", "name"), [(transition, "transition"), (step_cost, "step_cost"), (phases, "phases")])
def test_each_script_runs(script: object, name: str, tmp_path: Path) -> None:
    """`--quick` writes numbers, a table and a picture."""
    threads = torch.get_num_threads()
    try:
        script.main(["--quick", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert {"python", "torch", "cores", "threads"} <= json.loads((tmp_path / f"{name}.json").read_text())[
        "versions"
    ].keys()
    assert "## Targets" in (tmp_path / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_gpus_arms() -> None:
    """What is timed on a GPU is measured here, on the CPU: a row for each way, phase and arm, in the text as well."""
    training = small()
    ways = gpu.transitions(arms.Network.of(20), "cpu", 2)
    assert list(ways) == list(gpu.WAYS)
    rows = gpu.steps(training, "cpu", 2)
    assert [(row["phase"], row["arm"]) for row in rows[:4]] == [
        *(("before, 0 blocks", name) for name in (step_cost.REFERENCE, "late", "declared")),
        ("between, 1 blocks", step_cost.REFERENCE),
    ]
    assert all(row["optimizer, ms"].repeats == 2 and row["optimizer, ms"].median > 0 for row in rows)
    text = gpu.text_of(
        {"20 tensors": ways}, {"small": rows}, {"Unet": [dict.fromkeys(("blocks", "planned", "kept", "peak"), 2)]}
    )
    assert [text.count(f"## {title}") for title in ("A transition", "A step", "Memory")] == [1, 1, 1]
    assert text.count("| foreach |") == text.count("| fused |") == len(rows) // 2


def test_a_machine_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script for a GPU says in a line that there is none, and how it is tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        SystemExit, match="`--device` must be one of this machine, got cuda; --quick --device cpu tries"
    ):
        gpu.main(["--quick"])


@pytest.mark.parametrize(
    ("words", "folder"),
    [([], measuring.RESULTS), (["--quick"], Path("runs/quick")), (["--device", "cpu"], Path("runs/quick"))],
)
def test_a_look_overwrites_no_result(words: list[str], folder: Path) -> None:
    """Only what was measured in full, on the device that the script is for, goes to the results."""
    assert measuring.parse(None, words, device="cuda").output == folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what smp imports
def test_the_gpus_script_runs(tmp_path: Path) -> None:
    """`--quick` on the CPU writes numbers and tables, and names the card that there is not."""
    gpu.main(["--quick", "--device", "cpu", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["versions"]["card"] == "none"
    assert len(result["transitions"]) == 2
    assert "![](gpu.png)" not in (tmp_path / "gpu.md").read_text()
