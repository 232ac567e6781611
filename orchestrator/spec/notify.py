"""Who is told of what while nobody looks."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from trainer.frozen import Frozen, Name, Positive

Notice = Literal["finished", "diverged", "stalled"]
"""What can be told."""


class Notify(Frozen):
    """A webhook, a command, or both. The webhook's address is a secret: the file names the variable that holds it."""

    webhook_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, description="Environment variable with the address; it is sent Slack's JSON, {text: ...}."
    )
    command: tuple[Name, ...] | None = Field(
        default=None, min_length=1, description="Program and arguments; it reads the notice as JSON on its input."
    )
    on: tuple[Notice, ...] = get_args(Notice)
    stalled_minutes: Positive = Field(default=30.0, description="Without a point or any other sign of a worker.")

    @model_validator(mode="after")
    def _someone(self) -> Notify:
        if self.webhook_env is None and self.command is None:
            raise ValueError("needs webhook_env or command: nobody would be told")
        return self
