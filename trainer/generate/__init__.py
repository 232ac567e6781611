"""The product's own preference task, and small random models: what the quickstart and rehearsals run on."""

from trainer.generate.like import Likeness, likeness, tiny_like
from trainer.generate.model import generated_model
from trainer.generate.task import generated_rows, is_right

__all__ = ["Likeness", "generated_model", "generated_rows", "is_right", "likeness", "tiny_like"]
