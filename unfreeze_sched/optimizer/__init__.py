"""The torch.optim side: parameters join a live optimizer and its LR schedulers in place."""

from unfreeze_sched.optimizer.rebuilder import GroupChange, OptimizerRebuilder

__all__ = ["GroupChange", "OptimizerRebuilder"]
