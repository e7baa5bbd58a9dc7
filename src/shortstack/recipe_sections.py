"""Sections of a recipe that make depth a choice: trained exits, and a rule for when to leave."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingRecipe(Strict):
    """What every training on text is told; `options` are any other of `HealSettings` but those of
    `unread`, which are of no effect on it."""

    unread: ClassVar[frozenset[str]] = frozenset()

    window_tokens: int = Field(512, ge=8)
    batch_windows: int = Field(16, ge=1)
    learning_rate: float = Field(3e-4, gt=0, allow_inf_nan=False)
    general: str | None = Field(None, description="general text, mixed in")
    share: float = Field(0.5, ge=0, le=1, description="of general text")
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class ExitsRecipe(TrainingRecipe):
    """Exits of the frozen original (Balcony): trained together, each exported as a model."""

    unread = frozenset(
        {"alpha", "keep_float32", "loss", "replaces", "temperature", "top_k", "train"}
    )

    at: list[StrictInt] = Field(min_length=1, description="behind how many layers")
    tokens: int = Field(0, ge=0, description="to train on; 0 for init none alone")
    init: str = Field("last", description="last, random, norm-only, none")
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    export: list[StrictInt] | None = Field(
        None, description="which exits are exported; default: all"
    )
    bench: bool = Field(True, description="measure every depth in PyTorch, too")

    @property
    def chosen(self) -> tuple[int, ...]:
        """The exits that are exported."""
        return tuple(sorted(self.at if self.export is None else self.export))


class EarlyExitRecipe(Strict):
    """A rule for when prompts leave the original (AdaInfer), fitted and held against rows that
    neither its weights nor its threshold saw."""

    tune: str = Field(description="questions to fit to, .jsonl")
    validation: str | None = Field(None, description="for the threshold; default: a third of tune")
    test: list[str] = Field(min_length=1, description="questions that the report is about")
    max_accuracy_loss: float = Field(0.01, ge=0, lt=1)
    max_changed: float | None = Field(None, ge=0, le=1)
    check: str = "answers"
    classifier: str = "logistic"
    every: int = Field(2, ge=1)
    first: int = Field(2, ge=1)
    check_cost: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="time of a check in layers; default: measured"
    )
    answers: str = "auto"
    shots: int = Field(0, ge=0)
    rows: int | None = Field(None, ge=1, description="of a file, at most")
    context: int = Field(2048, ge=16)
    device: str = "cpu"
    dtype: str = "float32"

    @field_validator("test", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value
