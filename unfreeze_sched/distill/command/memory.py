"""How much memory a forward pass keeps for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass
class SavedBytes:
    """What autograd has saved so far.

    Attributes:
        total: Bytes of the distinct storages that are kept for backward, the model's own tensors left out.
    """

    total: int = 0
    _seen: set[int] = field(default_factory=set)

    def _add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # What is saved stays alive, so no address is used twice while the graph lives.
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@contextmanager
def saved_for_backward(model: nn.Module) -> Iterator[SavedBytes]:
    """Count the activations that a forward pass within the context saves for its backward pass.

    Args:
        model: Its parameters and buffers are there anyway, and are not counted.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> with saved_for_backward(layer) as saved:
        ...     loss = layer(torch.zeros(4, 8)).tanh().sum()
        >>> saved.total  # the input for the weight's gradient, and tanh's output: 4 x 8 floats each
        256
    """
    saved = SavedBytes()
    own = chain(model.parameters(), model.buffers())
    saved._seen.update(tensor.untyped_storage().data_ptr() for tensor in own)  # noqa: SLF001  # one class, one function
    with torch.autograd.graph.saved_tensors_hooks(saved._add, lambda tensor: tensor):  # noqa: SLF001  # likewise
        yield saved
