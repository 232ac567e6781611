"""One model sharded over the processes of a trial by FSDP2, torch's `fully_shard`: shard, gather, local shards.

Each process holds a range of the rows of every weight, split like `torch.chunk`, with the gradient and the moments of
that range; a full tensor on disk therefore fits any number of processes. Gradients are summed, not averaged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class CannotShard(ValueError):
    """The model's layers are not known, or cannot be sharded."""


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Keep this process's shard of every weight on `device` and drop the rest. All processes must call it.

    Trainable parameters must be chosen before. A layer's weights are gathered only while it computes; those outside of
    the layers from the forward pass until their backward pass.
    """
    names = set(model._no_split_modules or ())  # pyright: ignore[reportPrivateUsage]
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise CannotShard(f"{type(model).__name__} does not declare its layers (_no_split_modules)")
    kinds = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    if len(kinds) > 1:
        raise CannotShard(f"trainable weights are in {' and '.join(kinds)}; sharding needs one dtype")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    try:
        for module in (*layers, model):
            fully_shard(module, mesh=mesh)
    except (RuntimeError, ValueError) as error:
        raise CannotShard(f"{type(model).__name__} cannot be sharded: {error}") from error
    for module in (*layers, model):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_sharded(model: nn.Module) -> bool:
    """Return whether this process has only shards of the model."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free gathered weights after a forward pass without backward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def gather_full(tensors: Mapping[str, Tensor], *, on_this_process: bool) -> dict[str, Tensor]:
    """Return full tensors on the CPU in processes with `on_this_process`, else nothing. All processes must call it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if on_this_process:
            found[name] = full.detach().to("cpu")
    return found


def copy_into(target: nn.Parameter, full: Tensor) -> None:
    """Copy a full tensor into `target`, of which this process may hold a shard."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(shard_of(full, target))
        else:
            target.copy_(full)


def shard_of(full: Tensor, like: DTensor) -> Tensor:
    """Return the rows of a full tensor that correspond to this process's shard of `like`; a view."""
    mesh = like.device_mesh
    shards, rank = full.chunk(mesh.size(), 0), mesh.get_local_rank()
    return shards[rank] if rank < len(shards) else full[:0]


def as_shard(local: Tensor, like: DTensor) -> DTensor:
    """Return this process's rows of a tensor as a DTensor that is sharded like `like`."""
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
