"""The torch.optim side: parameters join a live optimizer and its LR schedulers in place.

It imports the package's checks, `model`'s block, and `parallel`; it knows nothing of schedules.
"""

from unfreeze_sched.optimizer.rebuilder import GroupChange, OptimizerRebuilder

__all__ = ["GroupChange", "OptimizerRebuilder"]
