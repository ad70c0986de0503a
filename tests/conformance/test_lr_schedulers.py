"""A group that joins late follows every LR scheduler as if it had been there from the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as lrs

pytest.importorskip("timm")
pytest.importorskip("transformers")

from schedulers_matrix import BASE, RECIPES, REFUSED, Ratios, Recipe, Twins, cosine, plain, run, sequential, wobble

from unfreeze_sched.optimizer import rates

# SequentialLR steps a chain within it once while it is made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
@pytest.mark.parametrize("kind", ["sgd", "adam", "tensor"])
def test_every_scheduler(recipe: Recipe, kind: str) -> None:
    """Groups joining before steps 0, 3, 4 and 11 have the oracle's rates, momenta and states at every later step."""
    if kind == "tensor" and recipe.name.startswith("timm Plateau"):
        pytest.skip("timm takes the tensor itself for its base, and its plateau then fills it in place")
    for ratios, relative in (
        ([1.0] * 4, 0.0),
        ([0.5, 0.25, 0.125, 0.0625], 1e-12),
        ([0.1, 0.07, 0.049, 0.0343], 1e-12),
    ):
        twins = Twins(recipe, ratios, tensor=kind == "tensor", adam=kind != "sgd")
        assert run(twins, {0: 1, 3: 2, 4: 3, 11: 4}, 25, relative) == []


@pytest.mark.parametrize("recipe", REFUSED, ids=repr)
def test_what_only_declared_groups_can_follow(recipe: Recipe) -> None:
    """Late joins at another scale are refused with the way out and change nothing; at scale 1, and declared, all is exact."""
    twins = Twins(recipe, [0.1])
    assert run(twins, {}, 8, 0.0) == []
    before = copy.deepcopy((twins.ours.state_dict(), [plain(s.state_dict()) for s in twins.schedulers]))
    with pytest.raises(
        ValueError,
        match=r"`learning_rate_scale` must be 1 to join late where a \w+ with a floor of .* has played .*; pass membership='declared'",
    ):
        twins.join(1)
    assert (twins.ours.state_dict(), [plain(s.state_dict()) for s in twins.schedulers]) == before
    assert run(Twins(recipe, [1.0]), {8: 1}, 25, 0.0) == []
    assert run(Twins(recipe, [0.1], membership="declared"), {8: 1}, 25, 1e-12) == []
    assert run(Twins(recipe, [0.1]), {0: 1}, 25, 1e-12) == []  # nothing has happened before the first step


def test_a_nested_sequence_past_a_floor() -> None:
    """It is stepped once more while the outer one is made: what its parts say is not what happened, and it is refused."""
    nested = Recipe(
        "nested",
        lambda o, r: sequential(
            o, [lrs.SequentialLR(o, [cosine(o, 0.02), lrs.MultiplicativeLR(o, wobble)], [2]), lrs.StepLR(o, 3)], [12]
        ),
    )
    twins = Twins(nested, [0.5])
    assert run(twins, {}, 5, 0.0) == []
    with pytest.raises(ValueError, match=r"a CosineAnnealingLR with a floor of 0\.02 has played .*; pass membership="):
        twins.join(1)


@pytest.mark.parametrize("recipe", [*RECIPES, *REFUSED], ids=repr)
def test_declared_groups_on_a_scheduler_that_exists(recipe: Recipe) -> None:
    """Empty groups declared to a scheduler at its first value follow it exactly, whenever they are filled."""
    assert run(Twins(recipe, [0.1, 0.07], membership="declared"), {5: 2}, 25, 1e-12) == []


def double_a_base(twins: Twins) -> None:
    for scheduler in twins.schedulers:
        for part in rates._with_inner(scheduler):
            if hasattr(part, "base_lrs"):
                part.base_lrs[-1] *= 1 + 1e-9


def forget_the_row(twins: Twins) -> None:
    for group in twins.ours.param_groups[1:]:
        group["lr"] = BASE * 0.5


@pytest.mark.parametrize("mutation", [double_a_base, forget_the_row])
@pytest.mark.parametrize("name", ["CosineAnnealing, eta_min", "OneCycle", "Sequential", "Chained"])
def test_the_comparison_can_fail(name: str, mutation: Any) -> None:
    """A base off by a billionth, or a rate that missed the past, is found."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    twins = Twins(recipe, [0.5])
    assert run(twins, {5: 1}, 6, 1e-12) == []
    mutation(twins)
    assert run(twins, {}, 3, 1e-12) != []


@st.composite
def drawn_schedulers(draw: st.DrawFn) -> Recipe:
    """A leaf with drawn arguments, a sequence or a chain of such leaves; floors only where late joins can follow them."""
    whole, share = st.integers(1, 12), st.floats(0.05, 1.0)

    def leaf(*, floors: bool) -> tuple[str, Callable[[Any, Ratios], Any]]:
        name = draw(st.sampled_from(["lambda", "multiplicative", "step", "multistep", "constant", "linear",
                                     "exponential", "polynomial", "cosine", "restarts"]))  # fmt: skip
        n, x, floor = draw(whole), draw(share), draw(st.sampled_from([0.0, 0.01, 0.3])) if floors else 0.0
        table: dict[str, Callable[[Any, Ratios], Any]] = {
            "lambda": lambda o, r: lrs.LambdaLR(o, lambda e: x ** (e % n)),
            "multiplicative": lambda o, r: lrs.MultiplicativeLR(o, lambda e: 1 - x / (n + e)),
            "step": lambda o, r: lrs.StepLR(o, n, x),
            "multistep": lambda o, r: lrs.MultiStepLR(o, [n, n + 2], x),
            "constant": lambda o, r: lrs.ConstantLR(o, x, n),
            "linear": lambda o, r: lrs.LinearLR(o, x, 1.0, n),
            "exponential": lambda o, r: lrs.ExponentialLR(o, x),
            "polynomial": lambda o, r: lrs.PolynomialLR(o, n, 2 * x),
            "cosine": lambda o, r: lrs.CosineAnnealingLR(o, n + 1, floor),
            "restarts": lambda o, r: lrs.CosineAnnealingWarmRestarts(o, n, 1 + n % 2, floor),
        }
        return f"{name}({n}, {x}, {floor})", table[name]

    kind = draw(st.sampled_from(["leaf", "sequential", "chained"]))
    if kind == "leaf":
        name, make = leaf(floors=True)
        return Recipe(name, lambda o, r: [make(o, r)])
    parts = [leaf(floors=False) for _ in range(draw(st.integers(2, 3)))]
    name = f"{kind} of {', '.join(name for name, _ in parts)}"
    if kind == "chained":
        return Recipe(name, lambda o, r: [lrs.ChainedScheduler([make(o, r) for _, make in parts])])
    milestones = sorted(draw(st.sets(st.integers(1, 14), min_size=len(parts) - 1, max_size=len(parts) - 1)))
    return Recipe(f"{name} at {milestones}", lambda o, r: sequential(o, [make(o, r) for _, make in parts], milestones))


@settings(max_examples=80)
@given(
    recipe=drawn_schedulers(),
    scale=st.floats(0.01, 1.0),
    decay=st.floats(0.2, 1.0),
    joins=st.lists(st.integers(0, 18), min_size=3, max_size=3).map(sorted),
)
def test_drawn_schedulers(recipe: Recipe, scale: float, decay: float, joins: list[int]) -> None:
    """Any scheduler, arguments, scale, decay and join steps: the oracle's rates, to rounding."""
    ratios = [scale * decay**depth for depth in range(3)]
    by_step = {step: 1 + max(i for i, other in enumerate(joins) if other == step) for step in joins}
    assert run(Twins(recipe, ratios), by_step, 22, 1e-12) == []
    assert run(Twins(recipe, [1.0] * 3), by_step, 22, 0.0) == []
