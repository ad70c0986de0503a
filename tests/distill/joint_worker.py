"""One rank that trains on its share of joint batches, or one process that trains on the whole of them.

Called as `python joint_worker.py OUT RANK WORLD`; leaves OUT/RANK.pt.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from processes import leave
from torch import Tensor, distributed, nn

from unfreeze_sched.distill.command.joint import joint_forward, share_of, wrap
from unfreeze_sched.distill.command.ranks import Ranks

SIZES = [5, 4, 1, 3]  # uneven shares, and a batch that is smaller than the ranks


class Net(nn.Module):
    """All that looks at a batch as a whole, or draws: norms, stochastic depth in both its forms, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4, affine=False, momentum=None)
        self.inner, self.windows = nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4, track_running_stats=False)
        self.drops = nn.ModuleList([nn.Dropout2d(0.3), nn.Dropout(0.2, inplace=True)])
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.first(images)).relu()
        x = x + self.inner(x) * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.7)
        x = self.bare(x) * torch.floor(0.8 + torch.rand([len(x), 1, 1, 1], dtype=x.dtype))
        x = x * (0.5 + torch.rand(1))  # one number for all images
        x = self.windows(x.transpose(1, 2).reshape(-1, 4, x.shape[-1])).reshape(x.shape)
        for drop in self.drops:
            x = drop(x)
        logits = self.last(x)
        return logits, logits.detach().square()


def loss_of(logits: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """No mean of the images' losses, as Dice is none."""
    chosen = logits.softmax(1)[:, 1]
    return 1 - (chosen * masks).sum() / (chosen + masks).sum() + (logits - targets).square().mean()


def train(ranks: Ranks, *, joint: bool = True) -> dict[str, Any]:
    """A few steps; what they leave."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = Net().train()
    module = wrap(net, ranks, torch.device("cpu"))
    data = torch.Generator().manual_seed(1)
    optimizer, gradients = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), []
    for size in SIZES * 2:
        images, masks = torch.randn(size, 3, 6, 6, generator=data), torch.rand(size, 6, 6, generator=data).round()
        share = share_of(size, ranks)
        own = images[share.places], masks[share.places]
        loss = loss_of(*joint_forward(module, *own, share)) if joint else loss_of(*module(own[0]), own[1])
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in net.named_parameters()})
        optimizer.step()
    return {"gradients": gradients, "state": net.state_dict(), "random": torch.get_rng_state()}


if __name__ == "__main__":
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(
        {way: train(Ranks(rank, world), joint=way == "joint") for way in ("joint", "by share")}, folder / f"{rank}.pt"
    )
    leave()
