"""What a person can get wrong about one trial: a sentence each, no traceback needed."""

from __future__ import annotations


class TrialError(Exception):
    """A model, a data set or a folder that cannot be used as asked; the message says what and what to do."""


class ModelError(TrialError):
    """The start model cannot be loaded, or not in the way the configuration asks."""


class ResumeError(TrialError):
    """A folder holds the work of another configuration."""
