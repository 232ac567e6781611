"""What TRL and transformers' Trainer change on objects that the next trial uses too, put back afterwards."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState, GradientState, PartialState

from trainer.models.live import LiveModel


@contextmanager
def left_as_found(live: LiveModel) -> Generator[None]:
    """Until this ends attributes may change: the model's forward, its configs' tokens and cache, accelerate's state.

    Weights are none of this: they change, as they should.
    """
    model: Any = live.base
    configs = [model.config, model.config.get_text_config(), model.generation_config]
    attributes = [vars(one) for one in (model, live.to_save, *configs) if one is not None]
    states: list[dict[str, Any]] = [
        kind._shared_state  # pyright: ignore[reportPrivateUsage]
        for kind in (PartialState, AcceleratorState, GradientState)
    ]
    before = [(now, dict(now)) for now in (*attributes, *states)]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)
