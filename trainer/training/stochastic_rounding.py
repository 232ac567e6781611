"""AdamW with stochastic rounding for bfloat16 weights without float32 copies: moments in float32.

Rounding to nearest loses every update below half of bfloat16's step (1/256 of the weight), which is nearly every update
at the learning rates of preference tuning. If a value is rounded up or down with probability proportional to the
distance, updates are correct in expectation (Gupta et al. 2015, arXiv 1502.02551). Memory per parameter: 2 bytes of
weight, 2 of gradient, 8 of moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer import memory_limits

_LOW_BITS = 16
"""Number of bits that float32 has more than bfloat16."""


class RoundingAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW(fused=True)` for bfloat16 parameters; float32 ones among them are not rounded.

    The random numbers are determined by seed and step.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: Sequence[int],
    ) -> None:
        """`groups`: dicts with `params` and `weight_decay`. `seed`: one number, and the rank if weights are sharded."""
        super().__init__(groups, {"lr": lr})
        self._betas, self._eps, self._seed = betas, eps, seed
        self._counted: tuple[Tensor, int] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyright: ignore
        """Take one step from the parameters' gradients."""
        generator: torch.Generator | None = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in parameters]
            for parts in _chunks(parameters):
                generator = generator or self._generator(parameters[0], states[0]["step"])
                self._step_parts(
                    group, [(part, parameters[part.index], states[part.index]) for part in parts], generator
                )
            for state in states:
                state["step"].add_(1)

    def _step_parts(
        self,
        group: dict[str, Any],
        parts: Sequence[tuple[_Part, nn.Parameter, dict[str, Tensor]]],
        generator: torch.Generator,
    ) -> None:
        """Step some parts of the parameters. Transient memory: 10 bytes per bfloat16 element."""
        exact = [part.of(parameter).float() for part, parameter, _ in parts]  # a float32 weight itself, not a copy
        adamw(
            exact,
            [part.of(p.grad).float() for part, p, _ in parts if p.grad is not None],
            [part.of(state["exp_avg"]) for part, _, state in parts],
            [part.of(state["exp_avg_sq"]) for part, _, state in parts],
            [],
            [state["step"].clone() for _, _, state in parts],  # the copy is incremented; the state after all parts
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._eps,
            maximize=False,
        )
        for (part, parameter, _), value in zip(parts, exact, strict=True):
            if parameter.dtype is torch.bfloat16:
                part.of(parameter).copy_(round_stochastically(value, generator))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        return self.state[parameter]

    def _generator(self, parameter: nn.Parameter, done: Tensor) -> torch.Generator:
        """Return the generator of a step: the same in every process with a copy of the weights, so that copies stay
        equal.
        """
        # Read once, not at every step: reading waits for a GPU. Loaded state is another tensor.
        steps = self._counted[1] + 1 if self._counted is not None and self._counted[0] is done else int(done)
        self._counted = (done, steps)
        sampled = np.random.SeedSequence([self._seed[0], steps, _LOW_BITS, *self._seed[1:]]).generate_state(1)[0]
        return torch.Generator(parameter.device).manual_seed(int(sampled))


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbors, with probability by distance. Overwrites `exact`.

    Values must be finite.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << _LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits.add_(noise).bitwise_and_(-(1 << _LOW_BITS))
    return exact.bfloat16()


@dataclass(frozen=True, slots=True)
class _Part:
    """A parameter, or a range of the elements of a large one."""

    index: int
    range: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor shaped like the parameter; a view if the tensor is contiguous."""
        return tensor.detach() if self.range is None else tensor.detach().reshape(-1)[self.range]


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[_Part]]:
    """Yield parts in the order of the parameters, grouped up to ROUNDING_CHUNK_ELEMENTS."""
    chunk: list[_Part] = []
    size = 0
    for index, parameter in enumerate(parameters):
        for element_range in _ranges(parameter):
            elements = parameter.numel() if element_range is None else element_range.stop - element_range.start
            if chunk and size + elements > memory_limits.ROUNDING_CHUNK_ELEMENTS:
                yield chunk
                chunk, size = [], 0
            chunk.append(_Part(index, element_range))
            size += elements
    if chunk:
        yield chunk


def _ranges(parameter: nn.Parameter) -> Iterator[slice | None]:
    """Yield ranges of at most ROUNDING_CHUNK_ELEMENTS, the last up to one `_wave` larger; None for a whole parameter.

    The random numbers are those of the whole tensor: a CPU draws them in sequence, a GPU in waves of a fixed size.
    """
    elements, wave = parameter.numel(), _wave(parameter.device)
    if elements <= memory_limits.ROUNDING_CHUNK_ELEMENTS or not parameter.is_contiguous():
        yield None
        return
    width, begin = max(1, memory_limits.ROUNDING_CHUNK_ELEMENTS // wave) * wave, 0
    while elements - begin >= width + wave:
        yield slice(begin, begin + width)
        begin += width
    yield slice(begin, elements)


def _wave(device: torch.device) -> int:
    """Return how many elements torch's GPU generator fills per launch wave, four per thread; on a CPU 64, a multiple of
    every vector width.
    """
    if device.type != "cuda":
        return 64
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count * gpu.max_threads_per_multi_processor * 4
