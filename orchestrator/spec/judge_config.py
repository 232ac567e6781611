"""Settings of the judge: the judges, the trials and prompts to compare, and how completions are generated."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trainer.config.base import FrozenModel, NonEmptyStr, NonNegativeFloat, PositiveFloat, PositiveInt
from trainer.config.trial import Source

_NonNegativeInt = Annotated[int, Field(ge=0)]


class RewardModel(FrozenModel):
    """A sequence-classification model: the completion with the higher score wins. Shorthand: its name alone."""

    name_or_path: NonEmptyStr = Field(description="Hub name or folder.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    label: _NonNegativeInt | None = Field(
        default=None, description="Index of the output that is the reward; needed if the model has several."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of its weights.")
    max_length: PositiveInt = Field(
        default=4096, description="Tokens of a dialogue; longer ones are truncated at their beginning."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value


class Endpoint(FrozenModel):
    """A language model behind an OpenAI-compatible API. The file names the environment variable with its key."""

    url: NonEmptyStr = Field(description="URL up to /chat/completions, such as https://api.openai.com/v1.")
    model: NonEmptyStr = Field(description="Name of the model at the endpoint.")
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, description="Environment variable with the API key; null: no key is sent."
    )
    prompt_price: NonNegativeFloat | None = Field(
        default=None, description="Price of a million prompt tokens, in any currency."
    )
    completion_price: NonNegativeFloat | None = Field(
        default=None, description="Price of a million completion tokens, in the same currency."
    )
    max_cost: PositiveFloat | None = Field(
        default=None,
        description="Limit on the judge's cost; up to it a sweep sends requests without asking for confirmation.",
    )
    max_tokens: PositiveInt = Field(
        default=32, description="Tokens of a reply; a model that reasons before it replies needs hundreds."
    )
    temperature: NonNegativeFloat | None = Field(default=0.0, description="null: not sent, for models that refuse it.")
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="Requests at a time.")
    timeout: PositiveFloat = Field(default=60.0, description="Seconds for one reply.")
    retries: _NonNegativeInt = Field(
        default=5, description="Retries of a failed request (429, 5xx, timeout), with exponential backoff."
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            valid = False
            parts = urlsplit("")
        if not valid:
            raise ValueError("must be an http:// or https:// address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not contain a user, password or query: the key comes from api_key_env")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_prices(self) -> Endpoint:
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("give both prompt_price and completion_price, or neither")
        if self.max_cost is not None and self.prompt_price is None:
            raise ValueError("max_cost needs prompt_price and completion_price")
        return self


class JudgeConfig(FrozenModel):
    """Comparison of the best trials' completions of fixed prompts with the initial model's, greedy and sampled."""

    top: PositiveInt = Field(
        default=3, description="How many of the best trials are judged; their weights stay on disk."
    )
    prompts: PositiveInt = Field(default=128, description="How many distinct prompts, taken from the first row on.")
    prompts_from: Source | None = Field(
        default=None,
        description="Rows with a `prompt` and optionally an `answer`, such as AlpacaEval's; by default the held-out "
        "rows.",
    )
    samples: _NonNegativeInt = Field(default=1, description="Sampled completions per prompt, besides the greedy one.")
    max_new_tokens: PositiveInt = Field(default=512, description="Maximum tokens of a completion.")
    temperature: PositiveFloat = Field(default=0.7, description="Temperature of the sampled completions.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="Nucleus sampling: share of probability that is sampled from."
    )
    seed: int = Field(default=0, description="Seed of the sampled completions.")
    tokens_per_batch: PositiveInt = Field(
        default=32768, description="Tokens of one batch of generation or scoring; affects results by rounding only."
    )
    checker: bool = Field(default=True, description="Judge by the rows' own `answer`, if they have one.")
    reward_model: RewardModel | None = Field(
        default=None, description="A sequence-classification model that scores completions."
    )
    endpoint: Endpoint | None = Field(default=None, description="A language model behind an OpenAI-compatible API.")

    @property
    def only_checker(self) -> bool:
        """Whether the checker of known answers is the only judge, so that the prompts need an `answer`."""
        return self.checker and self.reward_model is None and self.endpoint is None

    @field_validator("prompts_from", mode="before")
    @classmethod
    def _expand_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def no_answer_for_checker(prompts: int) -> str:
    """Return the message about prompts none of which the checker, the only judge, has an answer for."""
    return (
        f"judge: none of the {prompts} prompts has an `answer` for the checker: give the rows an `answer` column, set "
        "judge.reward_model or judge.endpoint, or remove judge"
    )
