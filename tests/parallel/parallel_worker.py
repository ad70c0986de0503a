"""One rank of a process group: trains under an engine, over transitions, and saves what came of it.

Called as `python parallel_worker.py OUT RANK WORLD SCENARIO...`; the tests read OUT/SCENARIO.RANK.pt.
"""

import hashlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from processes import leave
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from unfreeze_sched import Block, MilestonePreset, OptimizerRebuilder, ProgressiveUnfreezer, UnfreezeSchedule
from unfreeze_sched.parallel import all_trainable, rewrap_ddp

MILESTONES = {1: 1, 2: 3, 4: 1, 5: 4}  # a refreezing among them
EPOCHS, STEPS, BATCH = 6, 3, 8
Step = Callable[[int, int], None]


class Net(nn.Module):
    """Four blocks and a head, whose norm layers do not see the batch, so that a joint batch is the ranks' batches."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    """A model, its optimizer and scheduler, and what the steps leave to compare."""

    def __init__(self, rank: int = 0, world: int = 1, optimizer: Any = torch.optim.AdamW, **keywords: Any) -> None:
        torch.manual_seed(0)
        self.rank, self.world = rank, world
        self.net = Net()
        self.model: nn.Module = self.net
        self.keywords = keywords
        self.optimizer_class = optimizer
        self.prints: list[str] = []
        self.bytes: list[tuple[int, int]] = []
        self.error = ""
        self.around: Callable[[torch.optim.Optimizer], AbstractContextManager[None]] = all_trainable
        self.resumed: dict[int, Any] = {}

    def build(self) -> "Run":
        """Optimizer, scheduler and unfreezer, of the parameters that the model has now."""
        self.optimizer = self.optimizer_class(self.net.head.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, EPOCHS * STEPS)
        blocks = [Block(f"block{i}", (block,)) for i, block in enumerate(self.net.blocks)]
        preset = MilestonePreset(milestones=MILESTONES, learning_rate_scale=0.5)
        schedule = UnfreezeSchedule(preset=preset, total_blocks=4, total_epochs=EPOCHS)
        self.unfreezer = ProgressiveUnfreezer(blocks, self.optimizer, schedule, [self.scheduler], **self.keywords)
        return self

    def train(
        self,
        on_change: Callable[["Run"], None] = lambda _: None,
        on_epoch: Callable[[int], None] = lambda _: None,
        start: int = 0,
    ) -> "Run":
        """All epochs from `start` on; a rank takes its share of each joint batch."""
        try:
            for epoch in range(start, EPOCHS):
                on_epoch(epoch)
                self.unfreezer.apply(epoch)
                if self.unfreezer.history[-1].epoch == epoch:
                    on_change(self)
                for step in range(STEPS):
                    generator = torch.Generator().manual_seed(100 * epoch + step)
                    inputs = torch.randn(BATCH * 4, 8, generator=generator)
                    targets = torch.randn(BATCH * 4, 2, generator=generator)
                    share = slice(self.rank, None, self.world)
                    loss = (self.model(inputs[share]) - targets[share]).square().mean()
                    loss.backward()
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    self.scheduler.step()
                    self.prints.append(fingerprint(self.net))
        except RuntimeError as error:
            self.error = str(error)
        return self

    def result(self) -> dict[str, Any]:
        return {
            "prints": self.prints,
            "weights": weights(self.net),
            "bytes": self.bytes,
            "error": self.error,
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "steps": len(self.prints),
            "resumed": self.resumed,
        }


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    """The full weights, gathered from the ranks where they are sharded."""
    if any(isinstance(module, FullyShardedDataParallel) for module in net.modules()):
        return {}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in net.state_dict().items()
    }


def fingerprint(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in weights(net).values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def count_bytes(run: Run) -> Callable[[Any, distributed.GradBucket], torch.futures.Future[torch.Tensor]]:
    """A communication hook that reduces as DDP does, and counts what it sends."""

    def hook(_: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        trainable = sum(4 * p.numel() for p in run.net.parameters() if p.requires_grad)
        run.bytes.append((buffer.numel() * buffer.element_size(), trainable))
        work = distributed.all_reduce(buffer.div_(run.world), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])

    return hook


def ddp_plain(run: Run) -> Run:
    """Frozen when wrapped, and never wrapped anew."""
    run.build().unfreezer.apply(0)
    run.model = DistributedDataParallel(run.net)
    return run.train()


def ddp_rewrap(run: Run) -> Run:
    run.build().unfreezer.apply(0)
    ddp = DistributedDataParallel(run.net, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, count_bytes(run))
    run.model = ddp

    def rewrap(run: Run) -> None:
        assert isinstance(run.model, DistributedDataParallel)
        run.model = rewrap_ddp(run.model)

    return run.train(rewrap)


def ddp_find_unused(run: Run) -> Run:
    run.model = DistributedDataParallel(run.net, find_unused_parameters=True)
    return run.build().train()


def fsdp2(run: Run) -> Run:
    fsdp2_shard(run)
    return run.build().train()


def fsdp2_shard(run: Run) -> None:
    for block in run.net.blocks:
        fully_shard(block)
    fully_shard(run.net)


def fsdp2_late(run: Run) -> Run:
    """Sharded after the unfreezer was made, whose tensors are the model's no longer."""
    run.build().unfreezer.apply(0)
    fully_shard(run.net)
    return run.train()


def fsdp1(run: Run) -> Run:
    run.net.blocks = nn.ModuleList(
        FullyShardedDataParallel(block, use_orig_params=True, device_id=torch.device("cpu")) for block in run.net.blocks
    )
    run.model = FullyShardedDataParallel(run.net, use_orig_params=True, device_id=torch.device("cpu"))
    run.build().train()
    with FullyShardedDataParallel.summon_full_params(run.model):
        run.full = {  # type: ignore[attr-defined]
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in run.model.named_parameters()
        }
    return run


def fsdp1_flat(run: Run) -> Run:
    """Without the original parameters there is nothing that could join, be the blocks made before or after."""
    blocks = [Block("block0", (run.net.blocks[0],))]
    optimizer = torch.optim.AdamW(run.net.head.parameters())
    wrapped = FullyShardedDataParallel(run.net.blocks[0], device_id=torch.device("cpu"))
    for made in (blocks, [Block("block0", (wrapped,))]):
        try:
            OptimizerRebuilder(optimizer, made)
        except ValueError as error:
            run.error += str(error) + "\n"
    return run


def checkpointed(run: Run) -> Run:
    """FSDP2, saved and loaded by torch.distributed.checkpoint between transitions."""
    fsdp2_shard(run)
    saved: dict[int, tuple[Any, Any]] = {}

    def name(epoch: int) -> Path:
        return Path(sys.argv[1], f"checkpoint{epoch}{run.around.__name__}{run.keywords}")

    def save(epoch: int) -> None:
        if epoch in {2, 4, 5}:
            with run.around(run.optimizer):
                model, optimizer = get_state_dict(run.model, run.optimizer)
            checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=name(epoch))
            saved[epoch] = run.unfreezer.state_dict(), run.scheduler.state_dict()

    run.build().train(on_epoch=save)
    for epoch, (unfreezer, scheduler) in saved.items():
        again = Run(run.rank, run.world, **run.keywords)
        torch.manual_seed(1)
        again.net = again.model = Net()
        fsdp2_shard(again)
        again.build()
        again.unfreezer.load_state_dict(unfreezer)
        again.scheduler.load_state_dict(scheduler)
        with run.around(again.optimizer):
            model, optimizer = get_state_dict(again.model, again.optimizer)
            checkpoint.load({"model": model, "optimizer": optimizer}, checkpoint_id=name(epoch))
            set_state_dict(again.model, again.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        again.train(start=epoch)
        run.resumed[epoch] = again.error or again.prints == run.prints[epoch * STEPS :]
    return run


def zero(run: Run) -> Run:
    run.optimizer_class = lambda parameters, lr: ZeroRedundancyOptimizer(
        parameters, optimizer_class=torch.optim.AdamW, lr=lr
    )
    return ddp_rewrap(run)


def checkpointed_warm(run: Run) -> Run:
    """The same in the middle of a warm-up of joining groups."""
    run.keywords["warmup_steps"] = 5
    return checkpointed(run)


def checkpointed_bare(run: Run) -> Run:
    """The same without the context, for what torch leaves out then."""
    run.around = nullcontext
    return checkpointed(run)


def ddp_drift(run: Run) -> Run:
    """What becomes of a DDP that does not cover the blocks when nobody looks."""
    run.keywords["probe"] = "off"
    return ddp_plain(run)


def local_sgd(run: Run) -> Run:
    """No engine at all, and the probe told so: ranks may differ."""
    run.keywords["probe"] = "local"
    return run.build().train()


def no_engine(run: Run) -> Run:
    return run.build().train()


def main() -> None:
    out, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    for name in sys.argv[4:]:
        run = globals()[name](Run(rank, world))
        result = run.result() if hasattr(run, "optimizer") else {"error": run.error}
        if hasattr(run, "full"):
            result["weights"] = run.full
        torch.save(result, out / f"{name}.{rank}.pt")
        distributed.barrier()
    leave()


if __name__ == "__main__":
    main()
