"""The product's own preference task, and small random models: what the quickstart and rehearsals run on."""

from trainer.synthetic.instructions import generated_rows, is_right
from trainer.synthetic.tiny_models import Likeness, generated_model, likeness, tiny_like

__all__ = ["Likeness", "generated_model", "generated_rows", "is_right", "likeness", "tiny_like"]
