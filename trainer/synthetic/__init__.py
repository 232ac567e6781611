"""The synthetic preference task and small random models, used by the quickstart and rehearsals."""

from trainer.synthetic.instructions import generate_rows, is_correct
from trainer.synthetic.tiny_models import ModelArchitecture, detect_architecture, generate_model, tiny_model_like

__all__ = [
    "ModelArchitecture",
    "detect_architecture",
    "generate_model",
    "generate_rows",
    "is_correct",
    "tiny_model_like",
]
