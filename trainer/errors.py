"""What a person can get wrong about one trial: a sentence each, no traceback needed."""

from __future__ import annotations


class TrialError(Exception):
    """A model, a data set or a folder that cannot be used as asked; the message says what and what to do."""


class ModelError(TrialError):
    """The start model cannot be loaded, or not in the way the configuration asks."""


def cannot_load(what: str, error: Exception) -> str:
    """Return the sentence about `what` that did not load; where its own code was refused, it names the flag.

    Args:
        what: The subject of the sentence: "the model /path".
        error: What transformers raised.
    """
    told = str(error).strip()
    if "trust_remote_code" in told:
        return (
            f"{what} comes with Python code of its own, which is run only with --trust-remote-code: read that code, "
            "and add the flag if you trust it"
        )
    return f"{what} cannot be loaded: {told}"


class ResumeError(TrialError):
    """A folder holds the work of another configuration."""
