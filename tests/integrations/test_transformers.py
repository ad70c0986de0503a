"""The Trainer of transformers with the callback, beside the plain loop over the same batches."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import differences
from processes import two_ranks
from snippets import added, side, snippets
from snippets import run as run_guide
from torch import nn
from torch.utils.data import Dataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from unfreeze_sched import (  # noqa: E402
    FractionPreset,
    MilestonePreset,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
    encoder_blocks,
)
from unfreeze_sched.guards import OverfitGuard, PlateauTrigger  # noqa: E402
from unfreeze_sched.integrations.transformers import UnfreezeTrainerCallback  # noqa: E402
from unfreeze_sched.optimizer import rates  # noqa: E402

EPOCHS, SAMPLES, BATCH = 5, 12, 3
STEPS = EPOCHS * SAMPLES // BATCH
PRESET = RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1, learning_rate_scale=0.5)
PER_STEP = RatePreset(unfreeze_start_epoch=3, unfreeze_rate=5, learning_rate_scale=0.5)


def bert(dropout: float = 0.0) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def vit(dropout: float = 0.0) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.ViTForImageClassification(config)


class Samples(Dataset[dict[str, Any]]):
    """Random samples of what the model takes."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(2)
        if model.config.model_type == "bert":
            self.inputs = {"input_ids": torch.randint(40, (SAMPLES, 6), generator=generator)}
        else:
            self.inputs = {"pixel_values": torch.randn(SAMPLES, 3, 16, 16, generator=generator)}
        self.inputs["labels"] = torch.randint(2, (SAMPLES,), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index] for key, value in self.inputs.items()}


def make_trainer(root: Path, model: nn.Module, callback: Any, **arguments: Any) -> Any:
    """A Trainer that writes down its batches."""
    collate = transformers.default_data_collator
    batches: list[dict[str, Any]] = []

    def collator(samples: list[Any]) -> dict[str, Any]:
        batches.append(collate(samples))
        return batches[-1]

    settings: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 4,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "adamw_torch_fused",  # the default only from torch 2.8 on
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **arguments,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(root), **settings),
        train_dataset=Samples(model),
        eval_dataset=Samples(model),
        data_collator=collator,
        callbacks=[callback] if callback else None,
    )
    trainer.batches = batches
    return trainer


def twins(make: Callable[..., nn.Module], dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make(dropout)
    return model, copy.deepcopy(model)


def plain_loop(
    model: nn.Module,
    batches: list[dict[str, Any]],
    preset: Any,
    unit: str = "epochs",
    accumulate: int = 1,
    divisor: int = 1,
) -> Any:
    """The library in a loop of one's own, with what the Trainer does besides: two groups, linear warm-up, clipping."""
    blocks = encoder_blocks(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    head = [(name, p) for name, p in model.named_parameters() if id(p) not in inside]
    groups = [
        {"params": [p for name, p in head if "bias" not in name and "layernorm" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in head if "bias" in name or "layernorm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
    steps = STEPS // accumulate
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 4, steps)
    schedule = UnfreezeSchedule(preset=preset, total_blocks=3, total_epochs=EPOCHS if unit == "epochs" else steps)
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule, lr_schedulers=[scheduler], no_decay=True)
    per_epoch = len(batches) // EPOCHS
    for index, batch in enumerate(batches):
        if index % per_epoch == 0 and unit == "epochs":
            unfreezer.apply(index // per_epoch)
        if unit == "steps" and index % accumulate == 0:
            unfreezer.apply(index // accumulate)
        model.train()
        (model(**batch).loss / divisor).backward()
        if (index + 1) % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return optimizer


def assert_equal(model: nn.Module, optimizer: Any, other: nn.Module, other_optimizer: Any) -> None:
    """Weights, states and groups, to the bit."""
    theirs = other.state_dict()
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, theirs[key])] == []
    ours, theirs = optimizer.state_dict(), other_optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize("make", [bert, vit])
@pytest.mark.parametrize(
    ("unit", "preset", "accumulate"),
    [("epochs", PRESET, 1), ("steps", PER_STEP, 1), ("steps", PER_STEP.replace(unfreeze_rate=2), 2)],
)
def test_a_run_equals_the_plain_loop(tmp_path: Path, make: Any, unit: Any, preset: Any, accumulate: int) -> None:
    """Through three transitions, by epochs or by steps, the Trainer's run is the plain loop's, to the bit."""
    if accumulate > 1 and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6):
        pytest.skip("before transformers 5.6 the Trainer divides an accumulated loss otherwise")
    model, twin = twins(make)
    callback = UnfreezeTrainerCallback(preset, unit=unit)
    trainer = make_trainer(tmp_path, model, callback, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert len(callback.unfreezer.schedule.transitions()) == 3
    divisor = 1 if make is bert else accumulate  # the Trainer leaves it to the model's loss, and BERT's does not divide
    optimizer = plain_loop(twin, trainer.batches, preset, unit, accumulate, divisor)
    assert_equal(model, trainer.optimizer, twin, optimizer)
    # Two groups of the Trainer's own, two for each block.
    assert [group.get("unfreeze_block") for group in optimizer.param_groups[2:]] == [
        block.name for block in reversed(callback.unfreezer.blocks) for _ in range(2)
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0] * 4


QUICK = [(bert, "epochs", 8), (bert, "steps", 14), (vit, "steps", 8), (vit, "epochs", 14)]
SLOW = [(m, unit, step) for m in (bert, vit) for unit in ("epochs", "steps") for step in range(1, STEPS)]


@pytest.mark.parametrize(
    ("make", "unit", "step"),
    QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW if case not in QUICK],
)
def test_resume_from_its_own_checkpoint(tmp_path: Path, make: Any, unit: Any, step: int) -> None:
    """`resume_from_checkpoint`, between epochs and within, into new objects, ends where the uninterrupted run ends."""
    preset = PRESET if unit == "epochs" else PER_STEP
    whole_model, begun = twins(make, 0.1)
    whole = make_trainer(tmp_path, whole_model, UnfreezeTrainerCallback(preset, unit=unit))
    whole.train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            _, state, control = arguments
            if state.global_step == step:
                control.should_save = control.should_training_stop = True

    trainer = make_trainer(tmp_path, begun, UnfreezeTrainerCallback(preset, unit=unit))
    trainer.add_callback(Stop())
    trainer.train()

    torch.manual_seed(99)
    model = make(0.1)
    if make is vit:  # whose weights this Trainer does not find again, with or without the callback (the next test)
        model = type(model).from_pretrained(tmp_path / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path, model, UnfreezeTrainerCallback(preset, unit=unit))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_equal(model, resumed.optimizer, whole_model, whole.optimizer)


def test_the_guide_is_right_about_renamed_weights(tmp_path: Path) -> None:
    """Without the callback too, the Trainer resumes a ViT without its layers' weights; then the guide's caveat can go."""
    model, _ = twins(vit)
    name = "vit.layers.0.mlp.fc1.weight"
    if name not in model.state_dict():
        pytest.skip("before transformers 5.9 a ViT's layers are called in the checkpoint as in the model")
    make_trainer(tmp_path, model, None, max_steps=1, save_strategy="steps", save_steps=1).train()
    fresh = make_trainer(tmp_path, vit(), None, max_steps=1)
    fresh.train(resume_from_checkpoint=True)
    assert not torch.equal(fresh.model.state_dict()[name], model.state_dict()[name])


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Blocks that join at a slightly lower rate make another run: the comparison sees it."""
    model, twin = twins(bert)
    trainer = make_trainer(tmp_path, model, UnfreezeTrainerCallback(PRESET))
    trainer.train()
    optimizer = plain_loop(twin, trainer.batches, PRESET.replace(learning_rate_scale=0.499))
    with pytest.raises(AssertionError):
        assert_equal(model, trainer.optimizer, twin, optimizer)


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    """An optimizer and a scheduler that are handed to the Trainer are unfrozen into like its own."""
    model, twin = twins(vit)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    trainer = make_trainer(tmp_path, model, None, max_grad_norm=0.0)
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
    trainer.add_callback(UnfreezeTrainerCallback(PRESET, no_decay=False))
    trainer.train()

    blocks = encoder_blocks(twin)
    inside = {id(p) for block in blocks for p in block.parameters()}
    own = torch.optim.SGD([p for p in twin.parameters() if id(p) not in inside], lr=0.05, momentum=0.9)
    own_scheduler = torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    schedule = UnfreezeSchedule(preset=PRESET, total_blocks=3, total_epochs=EPOCHS)
    unfreezer = ProgressiveUnfreezer(blocks, own, schedule, lr_schedulers=[own_scheduler])
    for index, batch in enumerate(trainer.batches):
        if index % 4 == 0:
            unfreezer.apply(index // 4)
        twin.train()
        twin(**batch).loss.backward()
        own.step()
        own_scheduler.step()
        own.zero_grad()
    assert_equal(model, trainer.optimizer, twin, own)


class Unlike(transformers.Trainer):
    """A Trainer with its blocks in a group of their own rate."""

    def create_optimizer(self, *_: Any) -> Any:
        blocks = encoder_blocks(self.model)
        inside = {id(p): p for block in blocks for p in block.parameters()}
        head = [p for p in self.model.parameters() if id(p) not in inside]
        self.optimizer = torch.optim.AdamW([{"params": head}, {"params": inside.values(), "lr": 1e-5}], lr=0.01)
        return self.optimizer


def test_a_rate_of_its_own_is_not_lost(tmp_path: Path) -> None:
    """An optimizer with a rate for the blocks alone is refused, since the schedule's own would replace it silently."""
    model, _ = twins(bert)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Unlike(model, arguments, train_dataset=Samples(model), callbacks=[UnfreezeTrainerCallback(PRESET)])
    with pytest.raises(
        ValueError, match=r"`optimizer` must not hold a group of block parameters alone .* group 1 at lr=1e-05"
    ):
        trainer.train()


def test_refreezing_and_a_longer_run(tmp_path: Path) -> None:
    """A schedule that goes back refreezes, and a run with a preset may be resumed into a longer one."""
    preset = MilestonePreset(milestones={1: 2, 2: 1}, learning_rate_scale=0.5)
    model, _ = twins(bert)
    arguments = {"save_strategy": "epoch", "lr_scheduler_type": "constant", "warmup_steps": 0}
    make_trainer(tmp_path, model, UnfreezeTrainerCallback(preset), num_train_epochs=3, **arguments).train()
    whole, _ = twins(bert)
    long = make_trainer(tmp_path / "long", whole, UnfreezeTrainerCallback(preset), **arguments)
    long.train()

    longer, _ = twins(bert)
    callback = UnfreezeTrainerCallback(preset)
    resumed = make_trainer(tmp_path, longer, callback, restore_callback_states_from_checkpoint=True, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(longer, resumed.optimizer, whole, long.optimizer)
    assert [any(p.requires_grad for p in block.parameters()) for block in callback.unfreezer.blocks] == [
        False,
        False,
        True,
    ]
    state = json.loads(next(tmp_path.glob("checkpoint-12/trainer_state.json")).read_text())
    assert json.loads(state["stateful_callbacks"]["unfreeze_sched"])["applied"] == [1, 2]


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    """A checkpoint of another preset is refused with the difference."""
    model, twin = twins(bert)
    make_trainer(tmp_path, model, UnfreezeTrainerCallback(PRESET), save_strategy="epoch").train()
    other = UnfreezeTrainerCallback(PRESET.replace(unfreeze_rate=2))
    with pytest.raises(ValueError, match=r"schedule\['preset'\]\['unfreeze_rate'\] saved as 1, now 2"):
        make_trainer(tmp_path, twin, other).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_resume_into_more_blocks(tmp_path: Path, unit: Any) -> None:
    """With `strict=False` a run goes on with a schedule that unfreezes more of the blocks, later; without, never."""
    each = 1 if unit == "epochs" else 4
    fewer = MilestonePreset(milestones={each: 1}, learning_rate_scale=0.5)
    more = MilestonePreset(milestones={each: 1, 3 * each: 3}, learning_rate_scale=0.5)
    whole_model, begun = twins(bert)
    whole = make_trainer(tmp_path / "whole", whole_model, UnfreezeTrainerCallback(more, unit=unit))
    whole.train()
    make_trainer(tmp_path, begun, UnfreezeTrainerCallback(fewer, unit=unit), save_strategy="epoch").train()

    saved, (model, _) = str(tmp_path / "checkpoint-8"), twins(bert)
    strict = make_trainer(tmp_path, model, UnfreezeTrainerCallback(more, unit=unit))
    with pytest.raises(ValueError, match=r"; pass strict=False to go on with another schedule$"):
        strict.train(resume_from_checkpoint=saved)
    model, _ = twins(bert)
    callback = UnfreezeTrainerCallback(more, unit=unit, strict=False)
    resumed = make_trainer(tmp_path, model, callback)
    resumed.train(resume_from_checkpoint=saved)
    assert_equal(model, resumed.optimizer, whole_model, whole.optimizer)
    assert [(past.epoch, past.number) for past in callback.unfreezer.history] == [(0, 0), (each, 1), (3 * each, 3)]


def test_blocks_and_rates_are_logged(tmp_path: Path) -> None:
    """The number of blocks and a rate for each that has joined lie beside the loss, in the history and for reporters."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            seen.append(dict(logs))

    model, _ = twins(bert)
    trainer = make_trainer(
        tmp_path, model, None, logging_strategy="steps", logging_steps=2, eval_strategy="epoch", warmup_steps=6
    )
    trainer.add_callback(Reporter())  # before the callback, as those of `report_to` are
    callback = UnfreezeTrainerCallback(PRESET)
    trainer.add_callback(callback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [(row["step"], row["unfreeze/blocks"]) for row in rows] == [
        (step, min(3, (step - 1) // 4)) for step in range(2, STEPS + 1, 2)
    ]
    names = [block.name for block in reversed(callback.unfreezer.blocks)]
    for row in rows:
        found = {key: value for key, value in row.items() if key.startswith("unfreeze/lr/")}
        assert found == {f"unfreeze/lr/{name}": row["learning_rate"] / 2 for name in names[: row["unfreeze/blocks"]]}
    assert [{**row, "step": None} for row in rows] == [{**row, "step": None} for row in seen if "loss" in row]
    assert not any("unfreeze/blocks" in row for row in trainer.state.log_history if "loss" not in row)


def test_a_trainer_with_a_log_of_its_own(tmp_path: Path) -> None:
    """A Trainer that overrides `log`, as its documentation suggests, gets the callback's lines with those it passes on."""
    lines = []

    class Own(transformers.Trainer):
        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log(logs, *args)
            lines.append(dict(logs))

    model, _ = twins(bert)
    arguments = transformers.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Own(model, arguments, train_dataset=Samples(model), callbacks=[UnfreezeTrainerCallback(PRESET)]).train()
    assert all("unfreeze/blocks" in line for line in lines if "loss" in line)
    assert any("loss" in line for line in lines)


GREEDY = {"lr_scheduler_type": "greedy", "warmup_steps": 0, "eval_strategy": "epoch"}


def test_refusals_name_what_works_in_the_trainer(tmp_path: Path) -> None:
    """The Trainer makes the scheduler before the callback sees anything, so no error says to come before it."""
    if not hasattr(transformers.optimization, "GreedyLR"):
        pytest.skip("an older transformers has no GreedyLR")
    text = "`lr_schedulers` must be of known classes, got transformers.optimization.GreedyLR; say what it keeps for each group, by unfreeze_sched.optimizer.rates.register, or take another lr_scheduler_type, such as 'constant'"
    for membership in ("late", "declared"):
        callback = UnfreezeTrainerCallback(PRESET, membership=membership)
        with pytest.raises(TypeError, match=re.escape(text) + "$"):
            make_trainer(tmp_path, twins(bert)[0], callback, **GREEDY).train()
    make_trainer(tmp_path, twins(bert)[0], callback, **GREEDY | {"lr_scheduler_type": "constant"}).train()


def test_greedy_made_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's way: registered and declared, each block keeps its share while the rate rises and falls."""
    if not hasattr(transformers.optimization, "GreedyLR"):
        pytest.skip("an older transformers has no GreedyLR")
    register, _ = snippets("transformers.md")
    monkeypatch.setattr(rates, "_ROWS", dict(rates._ROWS))
    names = run_guide(register, {"FractionPreset": FractionPreset, "UnfreezeTrainerCallback": UnfreezeTrainerCallback})
    keywords = {"patience": 0, "threshold": 1e-9, "factor": 0.5, "min_lr": 1e-3}
    trainer = make_trainer(tmp_path, twins(bert)[0], names["unfreeze"], lr_scheduler_kwargs=keywords, **GREEDY)
    trainer.train()
    head, *_, block = (group["lr"] for group in trainer.optimizer.param_groups)
    assert len(trainer.optimizer.param_groups) == 8
    assert head != 0.01
    assert block == pytest.approx(head / 10)
    rates._kind.cache_clear()
    rates.row_of.cache_clear()


@pytest.mark.filterwarnings("ignore:`lr_schedulers` should have no floor")
def test_a_floor_is_declared(tmp_path: Path) -> None:
    """A plateau's floor is refused for blocks that join late, and the way out that is named works."""
    keywords = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"min_lr": 2e-3, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"},
        "warmup_steps": 0,
        "eval_strategy": "epoch",
    }
    with pytest.raises(
        ValueError, match=r"`learning_rate_scale` must be 1 to join late .*; pass membership='declared'$"
    ):
        make_trainer(tmp_path, twins(bert)[0], UnfreezeTrainerCallback(PRESET), **keywords).train()
    declared = UnfreezeTrainerCallback(PRESET, membership="declared")
    trainer = make_trainer(tmp_path, twins(bert)[0], declared, **keywords)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [2e-3] * 8


def test_caps_without_an_evaluation_are_refused(tmp_path: Path) -> None:
    """A run that never evaluates would never unfreeze, or never hold: that is said when it begins."""
    callback = UnfreezeTrainerCallback(PRESET, monitor="eval_loss", caps=[PlateauTrigger()])
    text = "`monitor` must be a metric of a validation that takes place, got 'eval_loss' in a run without one, so that no cap would ever hear of it; pass eval_strategy='epoch' to TrainingArguments"
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        make_trainer(tmp_path, twins(bert)[0], callback).train()


@pytest.mark.parametrize("monitor", ["eval_one_loss", "eval_two_loss", "eval_loss"])
def test_several_datasets(tmp_path: Path, monitor: str) -> None:
    """They are evaluated one after another, and one of them has the metric; where none has, that is said."""
    model, _ = twins(bert)
    callback = UnfreezeTrainerCallback(PRESET, monitor=monitor, caps=[OverfitGuard()])
    trainer = make_trainer(tmp_path, model, callback, eval_strategy="epoch")
    trainer.eval_dataset = {"one": Samples(model), "two": Samples(model)}
    if monitor == "eval_loss":
        text = (
            r"`monitor` must be a metric of the validation, got 'eval_loss'; pass one of .*eval_one_loss.*eval_two_loss"
        )
        with pytest.raises(ValueError, match=text):
            trainer.train()
        return
    trainer.train()
    last = next(row[monitor] for row in reversed(trainer.state.log_history) if monitor in row)
    assert callback.unfreezer.caps[0].state_dict()["last"] == last


def test_what_the_model_needs_is_named_as_the_callback_takes_it(tmp_path: Path) -> None:
    """`example_input=` and `patterns=` are encoder_blocks' own, so the way to them is; the head is the callback's."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.config = bert().config

        def forward(self, input_ids: Any, labels: Any, scale: Any) -> Any:
            logits = self.head(self.body(self.stem(input_ids.float()))) * scale["of"]
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    trainer = make_trainer(tmp_path, Odd(), UnfreezeTrainerCallback(PRESET))
    with pytest.raises(
        ValueError, match=r"^`head` must say .*; pass head=\[\.\.\.\] with all that is new, or head=\(\)"
    ):
        trainer.train()
    trainer = make_trainer(tmp_path, Odd(), UnfreezeTrainerCallback(PRESET, head=lambda model: [model.head]))
    text = (
        ", or name the blocks with patterns=, both of encoder_blocks: blocks=lambda model: encoder_blocks(model, ...)"
    )
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        trainer.train()


def test_a_second_run_of_one_trainer(tmp_path: Path) -> None:
    """`train()` again goes on with the optimizer that the Trainer keeps: frozen anew, in the groups that are there."""
    model, _ = twins(bert)
    callback = UnfreezeTrainerCallback(PRESET)
    trainer = make_trainer(tmp_path, model, callback)
    trainer.train()
    first = callback.unfreezer
    trainer.train()
    assert callback.unfreezer is not first
    assert len(trainer.optimizer.param_groups) == 8
    assert [transition.number for transition in callback.unfreezer.history] == [0, 1, 2, 3]


def test_a_trainer_without_the_callback_is_as_before(tmp_path: Path) -> None:
    """Importing the module changes no other Trainer: it saves, and resumes to the bit."""
    model, twin = twins(bert)
    whole = make_trainer(tmp_path, model, None, save_strategy="epoch")
    whole.train()
    assert len(whole.optimizer.param_groups) == 2
    resumed = make_trainer(tmp_path, twin, None)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert_equal(twin, resumed.optimizer, model, whole.optimizer)


def test_caps_follow_the_monitored_metric(tmp_path: Path) -> None:
    """A guard that is fed the monitored metric holds the blocks, and goes on to hold them after a resume."""

    def run(epochs: int, *, resume: bool) -> Any:
        callback = UnfreezeTrainerCallback(PRESET, monitor="eval_runtime_of_a_kind", caps=[OverfitGuard(patience=1)])
        trainer = make_trainer(
            tmp_path, twins(bert)[0], callback, num_train_epochs=epochs, save_strategy="epoch", eval_strategy="epoch"
        )
        evaluate = trainer.evaluation_loop

        def worse(*args: Any, **keywords: Any) -> Any:
            output = evaluate(*args, **keywords)
            output.metrics["eval_runtime_of_a_kind"] = trainer.state.epoch
            return output

        trainer.evaluation_loop = worse
        trainer.train(resume_from_checkpoint=resume)
        before = callback.unfreezer.caps[0].state_dict()
        trainer.evaluate()  # no part of the run
        assert callback.unfreezer.caps[0].state_dict() == before
        return callback.unfreezer

    for unfreezer in (run(3, resume=False), run(EPOCHS, resume=True)):
        assert (unfreezer.caps[0].cap, len(unfreezer.rebuilder.optimizer.param_groups)) == (1, 4)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: UnfreezeTrainerCallback(None),
            TypeError,
            "`schedule` must be an UnfreezeSchedule or a preset, got NoneType; pass MEDIUM",
        ),
        (
            lambda: UnfreezeTrainerCallback(PRESET, unit="batches"),
            ValueError,
            "`unit` must be one of epochs, steps, got 'batches'; 'epochs' is the default",
        ),
        (
            lambda: UnfreezeTrainerCallback(PRESET, monitor=3),
            TypeError,
            "`monitor` must be a metric's name or None, got 3; pass one that you log",
        ),
        (
            lambda: UnfreezeTrainerCallback(PRESET, template_=1),
            TypeError,
            "unexpected keyword argument 'template_'",
        ),
    ],
)
def test_arguments_are_checked_at_once(call: Any, error: type[Exception], text: str) -> None:
    """What needs no model is refused where the callback is made."""
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_a_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without transformers the import says what to install."""
    monkeypatch.delitem(sys.modules, "unfreeze_sched.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = "`UnfreezeTrainerCallback` needs transformers and accelerate, of which one is not installed; pip install 'unfreeze-sched[transformers]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(text)):
        import_module("unfreeze_sched.integrations.transformers")


@pytest.mark.parametrize("which", ["before", "after"])
def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """Its run goes before and after, three lines longer at most."""
    monkeypatch.chdir(tmp_path)
    (diff,) = snippets("transformers.md", "diff")
    assert added(diff) <= 3
    model, _ = twins(bert)
    instead = {
        'AutoModelForSequenceClassification.from_pretrained("bert-base-uncased")': "bert()",
        "warmup_steps=100": "warmup_steps=2, report_to=[], use_cpu=True, save_strategy='no', dataloader_pin_memory=False",
    }
    names = {name: getattr(transformers, name) for name in ("Trainer", "TrainingArguments")}
    names |= {"bert": lambda: model, "train_dataset": Samples(model)}
    names = run_guide(side(diff, which), names, instead)
    assert len(names["trainer"].optimizer.param_groups) == (2 if which == "before" else 8)


def test_the_guide_to_renamed_weights(tmp_path: Path) -> None:
    """Its way to resume a ViT goes on from the checkpoint's weights."""
    _, code = snippets("transformers.md")
    model, _ = twins(vit)
    whole = make_trainer(tmp_path, model, UnfreezeTrainerCallback(PRESET), save_strategy="epoch")
    whole.train()
    names = {
        "ViTForImageClassification": transformers.ViTForImageClassification,
        "Trainer": transformers.Trainer,
        "arguments": whole.args,
        "train_dataset": Samples(model),
        "unfreeze": UnfreezeTrainerCallback(PRESET),
        "checkpoint": str(tmp_path / "checkpoint-8"),
    }
    run_guide(code, names)
    assert_equal(names["model"], names["trainer"].optimizer, model, whole.optimizer)


SCRIPT = """
import sys

from processes import leave
from test_transformers import *

def go(name, resume=None, **arguments):
    model, _ = twins(bert)
    trainer = make_trainer(Path(sys.argv[1]) / name, model, UnfreezeTrainerCallback(PRESET), **arguments)
    trainer.train(resume_from_checkpoint=resume)
    file = Path(sys.argv[1]) / f"{name}-{trainer.args.process_index}.pt"
    torch.save([model.state_dict(), trainer.optimizer.state_dict()], file)

go("whole", save_strategy="epoch")
go("resumed", str(Path(sys.argv[1]) / "whole" / "checkpoint-6"))
# Without unused parameters found: refused by DDP itself, or by the library before a silent step.
try:
    go("unused", ddp_find_unused_parameters=False)
except RuntimeError as error:
    (Path(sys.argv[1]) / f"refused-{torch.distributed.get_rank()}.txt").write_text(str(error))
leave()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Under `torchrun` the ranks keep equal to the bit, through a resume too; without unused parameters DDP refuses."""
    runs = two_ranks(tmp_path, SCRIPT)
    assert sorted(runs) == ["resumed-0", "resumed-1", "whole-0", "whole-1"]
    assert len(runs["whole-0"][1]["param_groups"]) == 8
    for name in ("whole-1", "resumed-0", "resumed-1"):
        assert differences(runs[name], runs["whole-0"]) == []
    assert len(list(tmp_path.glob("refused-*.txt"))) == 2
