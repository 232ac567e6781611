"""AdamW for weights in bfloat16 without float32 masters: moments in float32, each update rounded by chance.

Rounding to nearest loses every update below half of bfloat16's step (1/256 of the weight), which learning rates of
preference tuning nearly always are. Rounded by chance, up or down in proportion, the updates are right on average
(Gupta et al. 2015, arXiv 1502.02551). Memory per parameter: 2 bytes of weight, 2 of gradient, 8 of moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

_AT_ONCE = 1 << 26
"""Parameters whose float32 copies exist at the same time."""
_LOW_BITS = 16
"""Bits that float32 has more than bfloat16."""


class RoundingAdamW(torch.optim.Optimizer):
    """As `torch.optim.AdamW(fused=True)`, for bfloat16 parameters; float32 ones among them are not rounded.

    What chance decides follows from seed and step.
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
        """groups: dicts with `params` and `weight_decay`. seed: one number, then the process where weights are cut."""
        super().__init__(groups, {"lr": lr})
        self._betas, self._eps, self._seed = betas, eps, seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyright: ignore
        """One update from the parameters' gradients."""
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for parameters in _chunks([p for p in group["params"] if p.grad is not None]):
                states = [self._state(p) for p in parameters]
                generator = generator or self._generator(parameters[0], states[0]["step"])
                exact = [p.detach().float() for p in parameters]  # of a float32 one itself, updated in place
                adamw(
                    exact,
                    [p.grad.float() for p in parameters if p.grad is not None],
                    [s["exp_avg"] for s in states],
                    [s["exp_avg_sq"] for s in states],
                    [],
                    [s["step"] for s in states],
                    fused=True,
                    amsgrad=False,
                    beta1=self._betas[0],
                    beta2=self._betas[1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=self._eps,
                    maximize=False,
                )
                for parameter, value in zip(parameters, exact, strict=True):
                    if parameter.dtype is torch.bfloat16:
                        parameter.data.copy_(round_by_chance(value, generator))

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        return self.state[parameter]

    def _generator(self, parameter: nn.Parameter, done: Tensor) -> torch.Generator:
        """The same in every process that holds a copy of the weights, so that copies stay copies."""
        drawn = np.random.SeedSequence([self._seed[0], int(done), _LOW_BITS, *self._seed[1:]]).generate_state(1)[0]
        return torch.Generator(parameter.device).manual_seed(int(drawn))


def round_by_chance(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours, the nearer one more often: right on average. Uses `exact` up.

    Values must be finite.
    """
    bits = exact.view(torch.int32)
    noise = torch.randint(0, 1 << _LOW_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    bits.add_(noise).bitwise_and_(-(1 << _LOW_BITS))
    return exact.bfloat16()


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if chunk and size + parameter.numel() > _AT_ONCE:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.numel()
    if chunk:
        yield chunk
