"""Sharded parameters as the optimiser takes them: AdamW works weight by weight, so each process steps its own rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from trainer.sharding import as_slice, slice_of


class Slices:
    """`parameters`: ordinary parameters by name, each over the memory of this process's slice; whole ones as they are.

    `rank` is this process's number among those that share the weights, None where they are whole.
    """

    def __init__(self, trained: Mapping[str, nn.Parameter]) -> None:
        self._cut = {name: p for name, p in trained.items() if isinstance(p, DTensor)}
        self.parameters = {
            name: nn.Parameter(_local(p.detach())) if isinstance(p, DTensor) else p for name, p in trained.items()
        }
        first = next(iter(self._cut.values()), None)
        self.rank = None if first is None else first.device_mesh.get_local_rank()

    def collect(self) -> None:
        """Before a step: where the slices and their gradients are now."""
        for name, sharded in self._cut.items():
            mine = self.parameters[name]
            mine.data = _local(sharded.detach())
            mine.grad = None if sharded.grad is None else _local(sharded.grad)

    def drop_gradients(self) -> None:
        """After a step."""
        for sharded in self._cut.values():
            sharded.grad = None

    def total_norm(self) -> Tensor:
        """The norm of all gradients together, of all processes' slices."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if self.rank is None:
            return norm
        square = norm.double() ** 2
        distributed.all_reduce(square)
        return square.sqrt().to(norm.dtype)

    def to_whole(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Moments named `<moment>.<parameter>` as slices of whole tensors."""
        return {name: self._to_whole(name, moment) for name, moment in moments.items()}

    def of_whole(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of whole moments, this process's rows."""
        return {name: self._of_whole(name, moment) for name, moment in moments.items()}

    def _to_whole(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else as_slice(moment, like)

    def _of_whole(self, name: str, moment: Tensor) -> Tensor:
        like = self._like(name, moment)
        return moment if like is None else slice_of(moment, like)

    def _like(self, name: str, moment: Tensor) -> DTensor | None:
        """The parameter that a moment is cut like; the counter of steps is whole everywhere."""
        return self._cut.get(name.partition(".")[2]) if moment.dim() > 0 else None


def _local(sharded: Tensor) -> Tensor:
    assert isinstance(sharded, DTensor)
    return sharded.to_local()
