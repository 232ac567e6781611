"""Settings of the judge: who judges, which answers of the best trials, and how these are generated."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from trainer.config.base import FrozenModel, NonEmptyStr, NonNegativeFloat, PositiveFloat, PositiveInt
from trainer.config.trial import Source

_NonNegativeInt = Annotated[int, Field(ge=0)]


class RewardModel(FrozenModel):
    """A sequence-classification model: the answer it scores higher wins. Shorthand: its name alone."""

    name_or_path: NonEmptyStr = Field(description="Hub name or folder.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    label: _NonNegativeInt | None = Field(
        default=None, description="Which output is the reward; needed where the model has several."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of its weights.")
    max_length: PositiveInt = Field(
        default=4096, description="Tokens of a dialogue; longer ones lose their oldest tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"name_or_path": value} if isinstance(value, str) else value


class Endpoint(FrozenModel):
    """A language model behind an OpenAI-compatible address. Its key is a secret: the file names the variable."""

    url: NonEmptyStr = Field(description="What stands before /chat/completions, such as https://api.openai.com/v1.")
    model: NonEmptyStr = Field(description="Name of the model, as the endpoint calls it.")
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = Field(
        default=None, description="Environment variable with the key; none is sent where this is null."
    )
    prompt_price: NonNegativeFloat | None = Field(default=None, description="Per million tokens read, in any currency.")
    completion_price: NonNegativeFloat | None = Field(default=None, description="Per million tokens written.")
    max_cost: PositiveFloat | None = Field(
        default=None, description="No question is asked beyond this; and up to it a sweep asks without a person's yes."
    )
    max_tokens: PositiveInt = Field(default=32, description="Of a verdict; a model that thinks first needs hundreds.")
    temperature: NonNegativeFloat | None = Field(default=0.0, description="null: not sent, for models that refuse it.")
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="Questions under way at a time.")
    timeout: PositiveFloat = Field(default=60.0, description="Seconds for one answer.")
    retries: _NonNegativeInt = Field(
        default=5, description="Of a question that got no answer (429, 5xx, time-out), after waits that double."
    )

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:
            known = False
            parts = urlsplit("")
        if not known:
            raise ValueError("must be an http:// or https:// address")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must hold no user, password or query: the key comes from api_key_env")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_prices(self) -> Endpoint:
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("give both prompt_price and completion_price, or neither")
        if self.max_cost is not None and self.prompt_price is None:
            raise ValueError("max_cost needs prompt_price and completion_price")
        return self


class JudgeConfig(FrozenModel):
    """The best trials' answers to fixed prompts against the start model's, greedy and sampled."""

    top: PositiveInt = Field(
        default=3, description="Trials that are judged, the best first; their weights stay on disk."
    )
    prompts: PositiveInt = Field(default=128, description="Distinct prompts, from the first on.")
    prompts_from: Source | None = Field(
        default=None,
        description="Rows with a `prompt` and perhaps an `answer`, such as AlpacaEval's; by default the held-out rows.",
    )
    samples: _NonNegativeInt = Field(default=1, description="Sampled answers to each prompt, beside the greedy one.")
    max_new_tokens: PositiveInt = Field(default=512, description="Longest answer, in tokens.")
    temperature: PositiveFloat = Field(default=0.7, description="Of the sampled answers.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="Nucleus sampling: share of probability that is sampled from."
    )
    seed: int = Field(default=0, description="Of the sampled answers.")
    tokens_per_batch: PositiveInt = Field(
        default=32768, description="Of one batch of generation or of scoring; no effect on results but rounding."
    )
    checker: bool = Field(default=True, description="Judge by the rows' own `answer`, where they carry one.")
    reward_model: RewardModel | None = Field(
        default=None, description="A sequence-classification model that scores answers."
    )
    endpoint: Endpoint | None = Field(default=None, description="A language model behind an OpenAI-compatible address.")

    @field_validator("prompts_from", mode="before")
    @classmethod
    def _expand_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value
