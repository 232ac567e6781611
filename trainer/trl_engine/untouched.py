"""What TRL and transformers' Trainer change on objects that the next trial uses too, put back afterwards."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from trainer.models.live import LiveModel
from trainer.world import World


@contextmanager
def left_as_found(live: LiveModel, world: World) -> Generator[None]:
    """Until this ends attributes may change: the model's forward, its configs' tokens and cache, accelerate's state.

    Weights are none of this: they change, as they should.
    """
    model: Any = live.base
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    shared = [model, live.to_save, *configs, world.accelerator.state, world.accelerator.gradient_state]
    before = [(vars(one), dict(vars(one))) for one in shared if one is not None]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)
