"""On 2 and 4 real ranks: what an engine does not cover is refused, and with the ways out the ranks stay one model."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallel_worker
import pytest
import torch
from processes import environment
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import Block, OptimizerRebuilder
from unfreeze_sched.optimizer.watch import differing_gradients
from unfreeze_sched.parallel import _by_version, process_group, rewrap_ddp

WAYS = ["ddp_rewrap", "ddp_find_unused", "fsdp2", "fsdp1", "zero"]
OTHERS = ["ddp_plain", "no_engine", "fsdp2_late", "fsdp1_flat", "local_sgd", "ddp_drift"]
CHECKPOINTED = ["checkpointed", "checkpointed_warm", "checkpointed_bare"]
FSDP2 = {"fsdp2", "fsdp2_late", *CHECKPOINTED}

# Its collectives record an event on torch.cpu.Stream, which has had none to record before torch 2.7.
without_fsdp2 = not hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(without_fsdp2, reason="FSDP2 runs on the CPU from torch 2.7 on")
ways = [pytest.param(way, marks=needs_fsdp2 if way in FSDP2 else ()) for way in WAYS]


def launch(out: Path, world: int, scenarios: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Run the scenarios on `world` processes, as far as torch can; what each rank saved, by scenario."""
    scenarios = [name for name in scenarios if not (without_fsdp2 and name in FSDP2)]
    own = environment() | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    worker = Path(__file__).with_name("parallel_worker.py")
    logs = [out / f"log.{rank}" for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as text:
            command = [sys.executable, worker, out, str(rank), str(world), *scenarios]
            processes.append(subprocess.Popen(command, env=own, stdout=text, stderr=subprocess.STDOUT))
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {
        name: [torch.load(out / f"{name}.{rank}.pt", weights_only=True) for rank in range(world)] for name in scenarios
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launch(tmp_path_factory.mktemp("two"), 2, WAYS + OTHERS + CHECKPOINTED)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launch(tmp_path_factory.mktemp("four"), 4, WAYS)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """The same run in one process, on the joint batches."""
    return parallel_worker.Run().build().train().result()


@pytest.fixture(params=["two", "four"])
def ranks(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("way", ways)
def test_ranks_stay_one_model(way: str, ranks: dict[str, list[dict[str, Any]]], alone: dict[str, Any]) -> None:
    """Over a whole run with transitions the ranks are equal to the bit, and to one process within float error."""
    results = ranks[way]
    assert all(result["error"] == "" and result["steps"] == 18 for result in results)
    assert all(result["prints"] == results[0]["prints"] for result in results)
    assert all(result["rates"] == alone["rates"] for result in results)
    for result in results:
        assert result["weights"].keys() == alone["weights"].keys()
        for name, value in alone["weights"].items():
            assert torch.equal(result["weights"][name], results[0]["weights"][name])
            torch.testing.assert_close(result["weights"][name], value, atol=1e-6, rtol=1e-5)


def test_the_comparison_can_fail(two: dict[str, list[dict[str, Any]]], alone: dict[str, Any]) -> None:
    """A DDP that does not cover the blocks, unprobed, drifts apart without an error."""
    first, second = two["ddp_drift"]
    assert first["error"] == second["error"] == ""
    assert first["prints"][:3] == second["prints"][:3]  # before the first transition
    assert all(a != b for a, b in zip(first["prints"][3:], second["prints"][3:], strict=True))
    assert (first["weights"]["blocks.3.0.weight"] - alone["weights"]["blocks.3.0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("scenario", ["ddp_plain", "no_engine"])
def test_the_first_silent_step_is_refused(scenario: str, two: dict[str, list[dict[str, Any]]]) -> None:
    """All ranks raise before the first step that would let them drift, and name the parameters and both ways out."""
    for result in two[scenario]:
        assert result["steps"] == 3
        assert result["error"] == (
            "gradients of newly trainable parameters must be the same on all ranks, got others for block3/0.weight, "
            "block3/0.bias, block3/1.weight, block3/1.bias: DistributedDataParallel does not reduce what was frozen "
            "when it was made; wrap anew after each transition, ddp = unfreeze_sched.parallel.rewrap_ddp(ddp), or wrap "
            "while everything is trainable, with find_unused_parameters=True (probe='local' is for local SGD)"
        )


def test_local_sgd_is_let_be(two: dict[str, list[dict[str, Any]]]) -> None:
    """With `probe="local"` ranks may differ."""
    first, second = two["local_sgd"]
    assert first["error"] == second["error"] == ""
    assert first["prints"] != second["prints"]


@pytest.mark.parametrize("way", ["ddp_rewrap", "zero"])
def test_only_what_is_trainable_is_reduced(way: str, ranks: dict[str, list[dict[str, Any]]]) -> None:
    """After each wrap the bytes that a step sends are those of the trainable parameters, up and down."""
    sent = [reduced for reduced, _ in ranks[way][0]["bytes"]]
    assert sent == [trainable for _, trainable in ranks[way][0]["bytes"]]
    assert sent[::3] == [72, 424, 1128, 1128, 424, 1480]  # a step of each epoch


@needs_fsdp2
def test_sharded_after_the_fact(two: dict[str, list[dict[str, Any]]]) -> None:
    """`fully_shard` after the unfreezer was made leaves orphans, which are named before anything is trained."""
    for result in two["fsdp2_late"]:
        assert result["steps"] == 0
        assert "got block3/0.weight and 3 more in none of its modules any more" in result["error"]


def test_fsdp1_without_the_original_parameters_is_refused(two: dict[str, list[dict[str, Any]]]) -> None:
    """Whether the blocks were made before or after the wrapping."""
    for result in two["fsdp1_flat"]:
        before, after = result["error"].splitlines()
        for text in (before, after):
            assert "_flat_param, which FSDP made of several; pass use_orig_params=True" in text


@needs_fsdp2
def test_distributed_checkpoints(two: dict[str, list[dict[str, Any]]]) -> None:
    """A round trip through torch.distributed.checkpoint over transitions goes on to the same bits.

    Without `all_trainable` torch leaves the moments of refrozen blocks out (epoch 5 unfreezes such again).
    """
    for scenario in ("checkpointed", "checkpointed_warm"):
        assert [result["resumed"] for result in two[scenario]] == [{2: True, 4: True, 5: True}] * 2
    assert [result["resumed"] for result in two["checkpointed_bare"]] == [{2: True, 4: True, 5: False}] * 2


# In this process


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.first.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)))


def hook(_state: object, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")  # from torch 2.13 on
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bucket_cap_mb": 3},
        {"bucket_cap_mb_list": [1, 2]},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"broadcast_buffers": False},
        {"forward_sync_buffers": False},
        {"skip_all_reduce_unused_params": True, "find_unused_parameters": True},
        {"batched_grad_copy": True},
        {"dim": 1},
    ],
)
def test_a_new_wrapper_has_the_same_arguments(arguments: dict[str, Any]) -> None:
    """All that the constructor was given comes again, and the hooks; the new one covers what is trainable now."""
    if later := arguments.keys() - inspect.signature(DistributedDataParallel).parameters:
        pytest.skip(f"this torch's DistributedDataParallel has no {', '.join(later)}")
    old = DistributedDataParallel(Mixed(), **arguments)
    old.register_comm_hook("state", hook)
    old.eval()
    old.module.first.requires_grad_(True)
    before = {name: value.clone() for name, value in old.module.state_dict().items()}
    new = rewrap_ddp(old)
    kept = (
        *("bucket_bytes_cap", "bucket_bytes_cap_list", "bucket_bytes_cap_default", "find_unused_parameters", "dim"),
        *("gradient_as_bucket_view", "static_graph", "forward_sync_buffers", "skip_all_reduce_unused_params"),
        *("batched_grad_copy", "process_group", "device_ids", "output_device", "_comm_hooks", "training", "module"),
        "broadcast_buffers",
    )
    absent = object()  # by version
    for name in kept:
        assert getattr(new, name, absent) == getattr(old, name, absent), name
    assert old._get_ddp_logging_data()["num_parameter_tensors"] == 4
    assert new._get_ddp_logging_data()["num_parameter_tensors"] == 6
    assert not any(module.training for module in new.modules())
    assert all(torch.equal(value, before[name]) for name, value in new.module.state_dict().items())
    new(torch.randn(4, 4)).sum().backward()
    assert old.module.first.weight.grad is not None


@pytest.mark.parametrize("default", [True, False])
def test_what_older_constructors_are_given(default: bool) -> None:
    """The arguments of torch 2.6, 2.8 and 2.11 in words that each has."""
    old = {"bucket_bytes_cap": 3 * 2**20, "bucket_bytes_cap_default": default, "broadcast_buffers": False}
    given = {"broadcast_buffers": False} | ({} if default else {"bucket_cap_mb": 3})
    taken = {"broadcast_buffers", "bucket_cap_mb"}
    assert _by_version(SimpleNamespace(**old), dict.fromkeys(taken)) == given
    taken |= {"init_sync", "skip_all_reduce_unused_params"}
    old["skip_all_reduce_unused_params"] = True
    given |= {"init_sync": False, "skip_all_reduce_unused_params": True}
    assert _by_version(SimpleNamespace(**old), dict.fromkeys(taken)) == given
    taken.add("bucket_cap_mb_list")
    old["bucket_bytes_cap_list"] = [2**20, 2**21]
    given.pop("bucket_cap_mb", None)
    assert _by_version(SimpleNamespace(**old), dict.fromkeys(taken)) == given | {"bucket_cap_mb_list": [1, 2]}


@pytest.mark.usefixtures("group")
def test_what_cannot_be_wrapped_anew() -> None:
    """Mixed precision and delayed reductions leave hooks in the module; a bare model is no wrapper."""
    with pytest.raises(TypeError, match="`ddp` must be a DistributedDataParallel, got Mixed; pass the wrapped model"):
        rewrap_ddp(Mixed())
    ddp = DistributedDataParallel(Mixed())
    ddp._delay_all_reduce_params = [ddp.module.second.weight]
    with pytest.raises(ValueError, match="`ddp` must be made without delay_all_reduce_named_params, whose hooks stay"):
        rewrap_ddp(ddp)
    ddp._delay_all_reduce_params = []
    ddp.mixed_precision = object()
    with pytest.raises(ValueError, match="`ddp` must be made without mixed_precision, whose hooks stay in the module"):
        rewrap_ddp(ddp)


@pytest.mark.usefixtures("group")
def test_norms_of_gradients() -> None:
    """None, sparse, complex and overflown gradients have a norm to compare, and sharded ones are left out."""
    assert process_group() is None  # of one rank: nothing to compare with
    named = {name: nn.Parameter(torch.ones(2)) for name in ("none", "zero", "nan", "sparse", "flat")}
    assert differing_gradients({name: named[name] for name in ("none", "zero")}) == ([], False)
    named["complex"] = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    named["complex"].grad = torch.ones(2, dtype=torch.complex64)
    named["zero"].grad = torch.zeros(2)
    named["nan"].grad = torch.full((2,), torch.nan)
    named["sparse"].grad = torch.ones(2).to_sparse()
    named["flat"]._fsdp_flattened = True
    assert differing_gradients(named) == ([], True)
    assert differing_gradients({"flat": named["flat"]}) == ([], True)


def test_deepspeed_is_refused() -> None:
    """Its optimizers lay all parameters out when they are made, and its parameters are partitioned."""
    net = Mixed()
    own = torch.optim.SGD(net.second.parameters(), lr=0.1)
    # As it is there: no torch optimizer.
    stand_in = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(
        ValueError,
        match="`optimizer` must take further param groups, got DeepSpeed's DeepSpeedZeroOptimizer, which lays",
    ):
        OptimizerRebuilder(stand_in(), [Block("first", (net.first,))])
    net.first.weight.ds_id = 0
    with pytest.raises(
        ValueError, match="`blocks` must hold parameters that can join later, got first/weight, which DeepSpeed part"
    ):
        OptimizerRebuilder(own, [Block("first", (net.first,))])


def test_a_block_whose_parameters_are_gone() -> None:
    """A block that was emptied after it was made is refused."""
    net = Mixed()
    block = Block("first", (net.first,))
    del net.first.weight, net.first.bias
    with pytest.raises(
        ValueError, match="`blocks` must hold the model's own parameters, got 'first', which has none any more, as FSDP"
    ):
        OptimizerRebuilder(torch.optim.SGD(net.second.parameters(), lr=0.1), [block])
