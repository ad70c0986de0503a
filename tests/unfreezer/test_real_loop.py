"""What real loops do besides: mixed precision, accumulation, clipping, checkpointing, averages, tied and adapted weights."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import Net, Run, differences, twins
from snippets import ROOT, run, snippets
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from unfreeze_sched import (
    Block,
    MilestonePreset,
    ProgressiveUnfreezer,
    RatePreset,
    UnfreezeSchedule,
    encoder_blocks,
)
from unfreeze_sched.model.freezing import set_requires_grad, unfreeze
from unfreeze_sched.optimizer.watch import WARMUP_KEY

# transformers renames its own switch, and PEFT still reads the old name.
RENAMED = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing.* is deprecated:FutureWarning")

RISING = UnfreezeSchedule(preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1), total_blocks=3, total_epochs=5)
BACK = UnfreezeSchedule(preset=MilestonePreset(milestones={1: 2, 3: 0, 5: 3}), total_blocks=3, total_epochs=7)


def adamw(groups: Any, **keywords: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **keywords)


def lockstep(
    run: Run, oracle: Run, epochs: Sequence[int], step: Callable[[Run, Tensor, Tensor, int, int], object]
) -> list[str]:
    """Train both with a step of one's own, three an epoch; the first differences that appear, or none."""
    generator = torch.Generator().manual_seed(1)
    kind = next(run.model.parameters()).dtype
    for epoch in epochs:
        run.apply(epoch)
        oracle.apply(epoch)
        for i in range(3):
            x, y = torch.randn(8, 4, generator=generator).to(kind), torch.randn(8, 2, generator=generator).to(kind)
            for each in (run, oracle):
                step(each, x, y, epoch, i)
            if found := differences(run, oracle):
                return [f"epoch {epoch}, step {i}: {text}" for text in found]
    return []


# Mixed precision.


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaler(dtype: torch.dtype, fused: bool) -> None:
    """Under autocast with a GradScaler late join is exact, with overflows just before and just after each transition."""
    run, oracle = twins(RISING, lambda groups: adamw(groups, fused=fused), scale=0.5)
    scalers = {id(run): None, id(oracle): None}
    for each in (run, oracle):
        each.model.float()
        scalers[id(each)] = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)  # type: ignore[assignment]
    scales = []

    def step(each: Run, x: Tensor, y: Tensor, epoch: int, i: int) -> None:
        scaler: Any = scalers[id(each)]
        each.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (each.model(x).float() - y).square().mean()
        scaler.scale(loss).backward()
        if i != 1:
            next(p for p in each.model.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        before = {name: p.detach().clone() for name, p in each.model.named_parameters()}
        scaler.unscale_(each.optimizer)
        clip_grad_norm_(each.model.parameters(), 1.0, error_if_nonfinite=False)
        scaler.step(each.optimizer)
        scaler.update()
        moved = [name for name, p in each.model.named_parameters() if not torch.equal(p, before[name])]
        trainable = [name for name, p in each.model.named_parameters() if p.requires_grad]
        assert moved == (trainable if i == 1 else [])
        scales.append(scaler.get_scale())

    assert lockstep(run, oracle, range(5), step) == []
    assert scales[::2] == scales[1::2]
    assert scales[-1] == 1024.0 / 2**10


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_no_step_of_the_warm_up(fused: bool) -> None:
    """A step that a GradScaler left out leaves the warm-up where it was, also in a fused optimizer, whose step is called."""
    net = Net(1, dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.head.parameters(), fused=fused)
    schedule = UnfreezeSchedule(
        preset=RatePreset(unfreeze_start_epoch=0, unfreeze_rate=1), total_blocks=1, total_epochs=1
    )
    ProgressiveUnfreezer(net.make_blocks(), optimizer, schedule, None, warmup_steps=4).apply(0)
    scaler = torch.amp.GradScaler("cpu")
    taken = []
    for overflow in (True, False, True, False):
        scaler.scale(net(torch.randn(4, 4)).square().mean()).backward()
        if overflow:
            net.head.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(optimizer.param_groups[1][WARMUP_KEY][0])
    assert taken == [0, 1, 1, 2]


# Accumulation and clipping.


def test_accumulation_equals_the_large_batch() -> None:
    """Four micro-batches, with transitions between steps, train as the whole batch does, up to rounding."""
    run, oracle = twins(BACK, adamw, scale=0.5)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(BACK.total_epochs):
        run.apply(epoch)
        oracle.apply(epoch)
        for _ in range(3):
            x, y = torch.randn(8, 4, generator=generator).double(), torch.randn(8, 2, generator=generator).double()
            oracle.step(x, y)
            for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
                ((run.model(part) - target).square().mean() / 4).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            assert differences(run, oracle, relative=1e-9) == []


def test_a_transition_in_mid_accumulation_is_refused() -> None:
    """With micro-batches that no step has used a transition is an error, and changes nothing; after the step it is none."""
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters())
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RISING, None)
    unfreezer.apply(0)
    net(torch.randn(4, 4).double()).sum().backward()
    with pytest.raises(RuntimeError, match=r"got an accumulation that is not over; call optimizer\.step"):
        unfreezer.apply(1)
    assert len(optimizer.param_groups) == 1
    assert not any(p.requires_grad for p in net.blocks.parameters())
    optimizer.step()
    optimizer.zero_grad()
    assert unfreezer.apply(1)


@pytest.mark.parametrize("forgetful", [False, True])
def test_clipping_counts_no_stale_gradient(forgetful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm of all parameters' gradients is that of the trainable ones, after refreezing as well; it would notice."""
    if forgetful:
        monkeypatch.setattr(
            "unfreeze_sched.model.freezing.set_requires_grad", lambda *args, **kw: set_requires_grad(*args, **kw) and []
        )
    net = Net(3)
    optimizer = torch.optim.AdamW(net.head.parameters())
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, BACK, None, on_refreeze="drop")
    wrong = []
    for epoch in range(BACK.total_epochs):
        unfreezer.apply(epoch)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(8, 4).double()).square().mean().backward()
            live = [net.head, *list(net.blocks)[3 - BACK[epoch] :]]
            expected = torch.stack([p.grad.norm() for module in live for p in module.parameters()]).norm()  # type: ignore[union-attr]
            if not torch.isclose(clip_grad_norm_(net.parameters(), 0.1), expected, rtol=1e-12):
                wrong.append(epoch)
            optimizer.step()
    assert set(wrong) == ({3} if forgetful else set())  # from then on clipping has made them small


# Activation checkpointing.


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)  # type: ignore[operator]
        return self.head(x)


def train_by_step(
    model: nn.Module, blocks: Sequence[Block], head: nn.Module, inputs: Callable[[], Tensor]
) -> list[list[Tensor | None]]:
    """Train through `len(blocks)` transitions; all gradients of each step."""
    schedule = UnfreezeSchedule(
        preset=RatePreset(unfreeze_start_epoch=1, unfreeze_rate=1),
        total_blocks=len(blocks),
        total_epochs=len(blocks) + 1,
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule, None)
    torch.manual_seed(0)
    seen: list[list[Tensor | None]] = []
    for epoch in range(schedule.total_epochs):
        unfreezer.apply(epoch)
        model.train()
        for _ in range(2):
            output = model(inputs())
            getattr(output, "logits", output).square().mean().backward()
            seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    return seen


def same(a: list[list[Tensor | None]], b: list[list[Tensor | None]]) -> bool:
    return all(
        (p is None and q is None) or (p is not None and q is not None and torch.equal(p, q))
        for ours, theirs in zip(a, b, strict=True)
        for p, q in zip(ours, theirs, strict=True)
    )


def timm_vit() -> tuple[nn.Module, str]:
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 2}
    return timm.create_model("vit_tiny_patch16_224", **arguments), "head"


def transformers_vit() -> tuple[nn.Module, str]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=16, num_labels=2, **sizes)
    return transformers.ViTForImageClassification(config), "classifier"


def test_checkpoint_without_reentry() -> None:
    """Checkpointed blocks behind a frozen prefix have the plain model's gradients to the bit, at each transition."""
    torch.manual_seed(0)
    plain, model = Net(3), Checkpointed(3)
    model.load_state_dict(plain.state_dict())
    draw = lambda: torch.randn(4, 4).double()  # noqa: E731
    ours = train_by_step(model, model.make_blocks(), model.head, draw)
    assert same(ours, train_by_step(plain, plain.make_blocks(), plain.head, draw))
    assert [sum(p is not None for p in step) for step in ours[::2]] == [2, 6, 10, 14]


@pytest.mark.parametrize("make", [timm_vit, transformers_vit])
@RENAMED
def test_checkpoint_of_the_libraries(make: Callable[[], tuple[nn.Module, str]]) -> None:
    """The switches of timm and transformers give the gradients of the model without them to the bit."""
    torch.manual_seed(0)
    model, head = make()
    plain = copy.deepcopy(model)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    draw = lambda: torch.randn(2, 3, 32, 32)  # noqa: E731
    ours = train_by_step(model, encoder_blocks(model), model.get_submodule(head), draw)
    assert same(ours, train_by_step(plain, encoder_blocks(plain), plain.get_submodule(head), draw))
    assert sum(p is not None for p in ours[-1]) == sum(1 for _ in model.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("fixed", [False, True])
def test_a_reentrant_checkpoint_is_reported(fixed: bool) -> None:
    """A reentrant checkpoint on frozen inputs gives no gradient, and the parameters are named once; inputs that require one help."""
    torch.manual_seed(0)
    plain, model = Net(3), Checkpointed(3)
    model.load_state_dict(plain.state_dict())
    model.reentrant = True
    draw = lambda: torch.randn(4, 4).double()  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = train_by_step(model, model.make_blocks(), model.head, lambda: draw().requires_grad_(fixed))
    reported = [str(w.message) for w in caught if "no gradient reached" in str(w.message)]
    if fixed:
        # Reentry frees the graph as it goes, in another order, but the sums are the same.
        assert reported == []
        assert same(seen, train_by_step(plain, plain.make_blocks(), plain.head, draw))
    else:
        assert [f"blocks.{2 - i}.0.weight" in text for i, text in enumerate(reported)] == [True] * 3
        assert all("use_reentrant=False" in text for text in reported)


# Averages of weights.


class Normed(Net):
    def __init__(self) -> None:
        super().__init__(3, dtype=torch.float32)
        for block in self.blocks:
            norm = nn.BatchNorm1d(4)
            norm(torch.randn(8, 4) + 3)  # pretrained statistics, other than fresh ones
            block[1] = norm  # type: ignore[index]


@pytest.mark.parametrize("buffers", [False, True])
def test_an_average_of_weights(buffers: bool) -> None:
    """An exponential average keeps the pretrained weights of what is frozen to the bit, and follows what has joined."""
    torch.manual_seed(0)
    net = Normed()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RISING, None)
    pretrained = copy.deepcopy(net.state_dict())
    by_hand = {name: p.detach().clone() for name, p in net.named_parameters()}
    unfreezer.apply(0)  # norms are held when the copy is made
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    average.update_parameters(net)  # the first one copies
    for epoch in range(3):
        unfreezer.apply(epoch)
        for _ in range(3):
            net.train()
            optimizer.zero_grad()
            net(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            average.update_parameters(net)
            for name, p in net.named_parameters():
                by_hand[name].lerp_(p.detach(), 0.1)
        for name, value in average.module.state_dict().items():
            frozen = name.startswith(tuple(f"blocks.{i}." for i in range(3 - epoch)))
            if frozen:
                assert torch.equal(value, pretrained[name]), name
            elif name in by_hand:
                torch.testing.assert_close(value, by_hand[name])
                assert not torch.equal(value, pretrained[name])


def test_statistics_of_an_average() -> None:
    """`update_bn` computes new statistics for what has joined, and leaves the pretrained ones of what is frozen."""
    torch.manual_seed(0)
    net = Normed()
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RISING, None)
    unfreezer.apply(0)
    average = AveragedModel(net)
    unfreezer.apply(1)
    net.train()
    net(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    average.update_parameters(net)
    pretrained = {name: value.clone() for name, value in net.blocks[:2].state_dict().items()}

    # By hand: frozen norms in evaluation, the others with a cumulative average.
    twin = Normed()
    twin.load_state_dict(average.module.state_dict())
    twin.train()
    for block in twin.blocks[:2]:
        block[1].eval()
    twin.blocks[2][1].reset_running_stats()
    twin.blocks[2][1].momentum = None
    loader = [torch.randn(8, 4) + 1 for _ in range(3)]
    with torch.no_grad():
        for batch in loader:
            twin(batch)

    for block in average.module.make_blocks()[2:]:
        unfreeze(block)
    update_bn(loader, average)
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert all(torch.equal(value, pretrained[name]) for name, value in average.module.blocks[:2].state_dict().items())
    assert not net.blocks[0][1].training  # the original is held by its own
    unfreezer.apply(3)
    net.blocks[0][1].reset_running_stats()  # given back
    assert net.blocks[0][1].num_batches_tracked == 0


# Weights that are computed, shared, lazy or replaced.


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def symmetric(layer: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


WAYS = [symmetric, parametrizations.weight_norm, weight_norm, parametrizations.spectral_norm, spectral_norm]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS, ids=["symmetric", "weight_norm", "old_weight_norm", "spectral", "old_spectral"])
def test_parametrized_weights(way: Callable[[nn.Module], nn.Module]) -> None:
    """What a weight is computed from is frozen and joins, and trains as in a plain loop, to the bit."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        net = nn.Sequential(*(way(nn.Linear(4, 4)) for _ in range(3)), nn.Linear(4, 2))
        for _ in range(20):  # spectral norm's vectors are random at first, and pretrained ones are not
            net(torch.zeros(1, 4))
        return net

    net, twin = make(), make()
    blocks = [Block(f"b{i}", (net[i],)) for i in range(3)]
    optimizer = torch.optim.SGD(net[3].parameters(), lr=0.1, momentum=0.9)
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, RISING, None, learning_rate_scale=0.5)
    slow = [{"params": list(twin[i].parameters()), "lr": 0.05} for i in range(3)]
    twin_optimizer = torch.optim.SGD([{"params": twin[3].parameters()}, *slow], lr=0.1, momentum=0.9)
    start = copy.deepcopy(net.state_dict())
    for epoch in range(RISING.total_epochs):
        unfreezer.apply(epoch)
        for _ in range(2):
            x = torch.randn(8, 4)
            net.train()
            twin.train()
            for i, layer in enumerate(list(twin)[:3]):
                frozen = i < 3 - RISING[epoch]
                layer.requires_grad_(not frozen)
                if frozen:
                    layer.eval()
            for model, opt in ((net, optimizer), (twin, twin_optimizer)):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
            for name, value in net.state_dict().items():
                assert torch.equal(value, twin.state_dict()[name]), (epoch, name)
        if epoch == 1:  # the shallow blocks have not moved
            assert all(torch.equal(v, start[k]) for k, v in net.state_dict().items() if k[0] in "01")


def by_assignment(net: Net) -> object:
    return net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)


def by_weight_norm(net: Net) -> object:
    return [parametrizations.weight_norm(block[0]) for block in net.blocks]  # type: ignore[index]


def by_meta(net: Net) -> object:
    return net.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("replace", [by_assignment, by_weight_norm, by_meta])
def test_replaced_weights(replace: Callable[[Net], object]) -> None:
    """Weights that are replaced before the unfreezer is made train; those replaced after are refused by name."""
    net = Net(3)
    replace(net)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RISING, None)
    assert unfreezer.apply(1)
    name, parameter = next(iter(net.blocks[2].named_parameters()))
    before = parameter.detach().clone()
    parameter.data.nan_to_num_()
    net(torch.ones(2, 4).double()).sum().backward()
    assert parameter.grad is not None, name
    optimizer.zero_grad()

    late = Net(3)
    optimizer = torch.optim.SGD(late.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(late.make_blocks(), optimizer, RISING, None)
    unfreezer.apply(1)
    replace(late)
    with pytest.raises(
        RuntimeError, match=r"got blocks\.\d\.0\.weight( and \d+ more)? in none of its modules any more"
    ):
        unfreezer.apply(2)
    assert len(optimizer.param_groups) == 2
    assert before.shape == (4, 4) or replace is by_weight_norm


def test_other_devices_and_types() -> None:
    """`to` and `half` change a model in place: blocks and groups stay, and later blocks join."""
    net = Net(3)
    optimizer = torch.optim.SGD(net.head.parameters(), lr=0.1)
    unfreezer = ProgressiveUnfreezer(net.make_blocks(), optimizer, RISING, None)
    for epoch, kind in enumerate((torch.float64, torch.float16, torch.bfloat16, torch.float32)):
        net.to(kind)
        unfreezer.apply(epoch)
        net(torch.randn(4, 4).to(kind)).square().mean().backward()
        before = copy.deepcopy(net.state_dict())
        optimizer.step()
        optimizer.zero_grad()
        held = {p for group in optimizer.param_groups for p in group["params"]}
        assert held == {p for p in net.parameters() if p.requires_grad}
        assert not torch.equal(before["head.weight"], net.head.weight)
    assert len(held) == 14


def test_a_layer_that_is_used_twice() -> None:
    """A block whose module runs twice is in the optimizer once, and its gradient is the sum of both uses."""
    torch.manual_seed(0)
    shared, last, head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    net = nn.Sequential(shared, nn.Tanh(), shared, last, head)
    twin = copy.deepcopy(net)
    draw = lambda: torch.randn(4, 4)  # noqa: E731
    seen = train_by_step(net, [Block("shared", (net[0], net[2])), Block("last", (last,))], head, draw)
    assert len({id(p) for p in net.parameters()}) == len(list(net.parameters()))
    optimizer = torch.optim.SGD(
        [{"params": twin[4].parameters()}, {"params": [*twin[3].parameters(), *twin[0].parameters()], "lr": 0.01}],
        lr=0.1,
    )
    torch.manual_seed(0)
    for step in range(6):
        for i, needed in ((0, 4), (3, 2)):
            twin[i].requires_grad_(step >= needed)
        twin(draw()).square().mean().backward()
        for p, grad in zip(twin.parameters(), seen[step], strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_tied_to_the_embedding() -> None:
    """A head's optimizer that holds a tied encoder weight is refused by name; without it both uses train the weight."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    blocks = encoder_blocks(model)
    schedule = UnfreezeSchedule(preset=RISING.preset, total_blocks=len(blocks), total_epochs=4)
    refused = torch.optim.AdamW(model.cls.parameters())
    text = "`optimizer` must not hold parameters of the blocks yet, got bert.embeddings.word_embeddings.weight; "
    with pytest.raises(ValueError, match=f"^{re.escape(text)}if they are the head's, say so: encoder_blocks"):
        ProgressiveUnfreezer(blocks, refused, schedule, None)
    encoder = {p for block in blocks for p in block.parameters()}
    optimizer = torch.optim.AdamW([p for p in model.cls.parameters() if p not in encoder])
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, schedule, None)
    tied = model.cls.predictions.decoder.weight
    for epoch in range(4):
        unfreezer.apply(epoch)
        before = tied.detach().clone()
        model(torch.randint(50, (2, 8))).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(tied, before) == (epoch < len(blocks))
    with pytest.raises(ValueError, match="`blocks` must not share a parameter, got 'b/weight' in 'b' and 'a'"):
        ProgressiveUnfreezer([Block("b", (model.cls.predictions.decoder,)), Block("a", (tied,))], optimizer, schedule)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers() -> None:
    """A lazy layer is refused until a forward pass has made its weight, and then unfreezes like any other."""
    net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    block = lambda: Block("lazy", (net[0], net[1]))  # noqa: E731
    schedule = UnfreezeSchedule(preset=RISING.preset, total_blocks=1, total_epochs=2)
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"got 'lazy/0\.weight', which is not initialized; run one forward pass first"):
        ProgressiveUnfreezer([block()], optimizer, schedule, None)
    net(torch.randn(2, 3))
    unfreezer = ProgressiveUnfreezer([block()], optimizer, schedule, None)
    for epoch in range(2):
        unfreezer.apply(epoch)
        before = copy.deepcopy(net.state_dict())
        net.train()
        net(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == ({"2.weight", "2.bias"} if epoch == 0 else set(before) - {"0.bias"})  # which the norm undoes


def test_data_parallel() -> None:
    """The blocks of a DataParallel model are those of the model inside, and it trains as the bare model does."""
    torch.manual_seed(0)
    net = Net(3)
    plain = copy.deepcopy(net)
    wrapped = nn.DataParallel(net)
    blocks = encoder_blocks(wrapped, head=net.head, example_input=torch.zeros(2, 4).double())
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    draw = lambda: torch.randn(4, 4).double()  # noqa: E731
    assert same(
        train_by_step(wrapped, blocks, net.head, draw), train_by_step(plain, plain.make_blocks(), plain.head, draw)
    )


# Adapters.


def adapted() -> nn.Module:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=16, num_labels=2, **sizes)
    )
    targets = ["q_proj", "v_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, r=2, modules_to_save=["classifier"], init_lora_weights=False)
    )


@RENAMED
def test_whole_blocks_of_adapted_models_are_refused() -> None:
    """Blocks that would unfreeze PEFT's frozen base weights are refused, found by structure or made by hand."""
    model = adapted()
    fix = "pass patterns=[r'layer\\.0\\..*lora_', ...] to encoder_blocks, one a block"
    text = (
        "`patterns` must name the adapters of a PeftModel, got none: blocks found by structure would unfreeze the base "
        f"weights that PEFT froze; {fix}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        encoder_blocks(model)
    text = (
        "`blocks` must not hold a whole PEFT layer, got a Linear in 'layers.0': the base weight that PEFT froze would "
        f"be unfrozen with it; {fix}"
    )
    for make in (
        lambda: encoder_blocks(model.base_model.model),
        lambda: encoder_blocks(model, patterns=[r"layers\.0\."]),
    ):
        with pytest.raises(ValueError, match=r"^`blocks` must not hold a whole PEFT layer, got a Linear in "):
            make()
    layer = model.get_submodule("base_model.model.vit.layers.0")
    schedule = UnfreezeSchedule(preset=RISING.preset, total_blocks=1, total_epochs=2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ProgressiveUnfreezer([Block("layers.0", (layer,))], optimizer, schedule, None)


@RENAMED
def test_adapters_join_and_base_weights_stay() -> None:
    """Blocks of adapters train as in a plain loop to the bit; the base weights are never trainable and never move."""
    model, twin = adapted(), adapted()
    patterns = [rf"layers\.{i}\..*lora_" for i in range(3)]
    blocks = encoder_blocks(model, patterns=patterns)
    head = [p for name, p in model.named_parameters() if "modules_to_save" in name]
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any("base_layer" in name for name in base)
    optimizer = torch.optim.AdamW(head, lr=0.01)
    unfreezer = ProgressiveUnfreezer(blocks, optimizer, RISING, None, learning_rate_scale=0.5)
    adapters = [
        [p for name, p in twin.named_parameters() if re.search(pattern, name)] for pattern in reversed(patterns)
    ]
    twin_head = [p for name, p in twin.named_parameters() if "modules_to_save" in name]
    slow = [{"params": parameters, "lr": 0.005} for parameters in adapters]
    twin_optimizer = torch.optim.AdamW([{"params": twin_head}, *slow], lr=0.01)
    for epoch in range(RISING.total_epochs):
        unfreezer.apply(epoch)
        for depth, parameters in enumerate(adapters):
            for p in parameters:
                p.requires_grad_(depth < RISING[epoch])
        x = torch.randn(2, 3, 32, 32)
        for each, opt in ((model, optimizer), (twin, twin_optimizer)):
            opt.zero_grad()
            each(x).logits.square().mean().backward()
            opt.step()
        expected = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            assert torch.equal(p, expected[name]), (epoch, name)
            assert p.requires_grad == expected[name].requires_grad
    for name, p in model.named_parameters():
        if name in base:
            assert not p.requires_grad
            assert torch.equal(p, base[name])


def test_adapters_injected_into_a_plain_model() -> None:
    """The same holds for a model of one's own into which adapters were injected."""
    peft = pytest.importorskip("peft")
    net = Net(3, dtype=torch.float32)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r"blocks\.\d\.0", r=2), net)
    with pytest.raises(ValueError, match="`blocks` must not hold a whole PEFT layer, got a Linear in 'block0'"):
        ProgressiveUnfreezer(net.make_blocks(), torch.optim.SGD(net.head.parameters()), RISING, None)
    blocks = encoder_blocks(net, patterns=[rf"blocks\.{i}\..*lora_" for i in range(3)])
    net.head.requires_grad_(True)
    seen = train_by_step(net, blocks, net.head, lambda: torch.randn(4, 4))
    assert [sum(p is not None for p in step) for step in seen[::2]] == [2, 4, 6, 8]
    assert {name.split(".")[-3] for block in blocks for name, _ in block.named_parameters()} == {"lora_A", "lora_B"}


# The guide.


@RENAMED
def test_the_guide_runs() -> None:
    """Each Python block of the guide runs as it stands, after the ones before it."""
    pytest.importorskip("peft")
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    blocks = snippets("loops.md")
    assert len(blocks) > 5
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in blocks:
        run(code, names)


def guide_to(heading: str) -> dict[str, Any]:
    """What the guide's first snippet and the one under a heading leave behind."""
    first, *rest = snippets("loops.md")
    (path,) = ROOT.rglob("loops.md")
    section = path.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    torch.manual_seed(0)
    return run(next(code for code in rest if code in section), run(first, {}))


def test_the_guide_counts_steps() -> None:
    """Each block joins at its step, in the middle of an epoch, and no step is counted twice."""
    pytest.importorskip("timm")
    names = guide_to("Steps as the unit")
    assert [(past.epoch, past.number) for past in names["unfreezer"].history] == [(0, 0), (4, 1), (7, 2)]
    assert names["step"] == len(names["unfreezer"].schedule) == 12


def test_the_guide_keeps_a_stem_frozen() -> None:
    """The frozen stem is in no block and stays as it is to the end; the log has nothing to say of the others."""
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    names = guide_to("Parts that stay frozen")
    assert [block.name for block in names["blocks"]] == ["layer2", "layer3", "layer4"]
    names["unfreezer"].apply(3)
    body = names["model"].backbone.body
    assert not any(p.requires_grad for part in (body.conv1, body.layer1) for p in part.parameters())
    assert all(p.requires_grad for part in (body.layer2, body.layer4) for p in part.parameters())
