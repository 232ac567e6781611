"""The synthetic preference task and small random models, used by the quickstart and rehearsals."""

from trainer.synthetic.instructions import generate_rows, is_correct
from trainer.synthetic.tiny_models import generate_model

__all__ = ["generate_model", "generate_rows", "is_correct"]
