"""Recipes: YAML in, frozen checked values out. An unknown key is refused with the nearest known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from shortstack.artifact import ExportSpec
from shortstack.errors import ShortstackError, one_line, unknown
from shortstack.recipe_sections import EarlyExitRecipe as EarlyExitRecipe
from shortstack.recipe_sections import ExitsRecipe as ExitsRecipe
from shortstack.recipe_sections import Strict, TrainingRecipe

Part = TypeVar("Part", bound=BaseModel)
QUANTIZED = "-quantized"
"""Ends the name of an export of the quantized models."""
SHIPPED = Path(__file__).parent / "recipes"


class TextRecipe(Strict):
    """Three files, already disjoint, instead of one that we split."""

    calibration: str
    selection: str
    test: str


class PruneRecipe(Strict):
    """Which layers go. `drop` is a count for methods that score, layers for `explicit`."""

    method: str = "perplexity"
    drop: int | str | list[int] = Field(description="a count, or layers such as 11-15,20")
    windows: int = Field(8, ge=1, description="calibration windows")
    window_tokens: int = Field(256, ge=8)
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


class RepairRecipe(Strict):
    """Repair of the cut without training; kept where perplexity on the selection part falls."""

    method: str = Field("folded", description="auto, folded, or a repair by name")
    windows: int = Field(32, ge=4)
    window_tokens: int = Field(256, ge=8)


class HealRecipe(TrainingRecipe):
    """Training of the cut model towards the original; the best state on the selection part."""

    tokens: int = Field(ge=1, description="the student's budget")
    train: str = "all"


class QuantizeRecipe(Strict):
    """Original and pruned as codes times steps, for the exports that keep the codes."""

    bits: float = Field(gt=0, le=8, description="a weight of the packed file, all counted")
    method: str = Field("compensated", description="compensated or plain")
    windows: int = Field(32, ge=1, description="calibration windows of compensated")
    window_tokens: int = Field(512, ge=8)
    rate_weight: float = Field(0.0, ge=0, le=4)


KEEPS_CODES = ("packed", "packed:lossless", "gguf:Q8_0", "onnx:int8")
"""Targets that round no weight of a quantized model a second time."""


class ExportRecipe(Strict):
    """One artifact, of the pruned model and of the original."""

    to: str = Field(description="FORMAT:PRECISION, e.g. gguf:Q8_0")
    options: dict[str, str] = Field(default_factory=dict)
    max_perplexity_ratio: float = Field(
        1.25, gt=1.0, allow_inf_nan=False, description="gate of a quantized artifact"
    )
    quantized: bool | None = Field(
        None, description="of the models that `quantize` made; packed is, where there is that step"
    )

    @property
    def spec(self) -> ExportSpec:
        return ExportSpec.parse(self.to, **self.options)


class VerifyRecipe(Strict):
    """How much unseen text every artifact is compared on, and how much of it through the cache."""

    windows: int = Field(8, ge=1)
    window_tokens: int = Field(256, ge=16)
    decode_tokens: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _leaves_a_prompt(self) -> VerifyRecipe:
        if self.decode_tokens >= self.window_tokens:
            raise ValueError(
                f"decode_tokens {self.decode_tokens} leave nothing to prefill of "
                f"window_tokens {self.window_tokens}; make decode_tokens smaller"
            )
        return self


class CalibrationRecipe(Strict):
    """How much calibration text importance matrices and activation ranges are computed on."""

    windows: int = Field(16, ge=1)
    window_tokens: int = Field(512, ge=8)


class BenchRecipe(Strict):
    """The workload of one trial and how often it is repeated, original and pruned in turn."""

    prompt_tokens: int = Field(128, ge=1)
    decode_tokens: int = Field(64, ge=2)
    repeats: int = Field(6, ge=2)
    threads: int | None = Field(None, ge=1, description="default: the cores we may use")


class Recipe(Strict):
    """One run: a model and a text in; plan, artifacts, measurements and a report out."""

    model: str
    text: str | TextRecipe = Field("spdx", description="only early_exit alone reads none")
    prune: PruneRecipe | None = None
    repair: RepairRecipe | None = None
    heal: HealRecipe | None = None
    exits: ExitsRecipe | None = None
    early_exit: EarlyExitRecipe | None = None
    quantize: QuantizeRecipe | None = None
    export: tuple[ExportRecipe, ...] = Field((), description="early_exit alone needs none")
    calibration: CalibrationRecipe = CalibrationRecipe()
    verify: VerifyRecipe = VerifyRecipe()
    bench: BenchRecipe = BenchRecipe()
    seed: int = 0

    def takes_codes(self, wanted: ExportRecipe) -> bool:
        """Whether an export is made of the quantized models."""
        if wanted.quantized is None:
            return self.quantize is not None and wanted.spec.format == "packed"
        return wanted.quantized

    def slug(self, wanted: ExportRecipe) -> str:
        """What folder and report call an export."""
        return wanted.spec.slug + (QUANTIZED if self.takes_codes(wanted) else "")


def shipped_recipes() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def load_recipe(reference: str) -> Recipe:
    """Read a recipe file, or a shipped recipe by name.

    Raises ShortstackError for a missing file, bad YAML, an unknown key or a bad value.
    """
    path = Path(reference)
    if not path.is_file():
        path = SHIPPED / f"{reference}.yaml"
    if not path.is_file():
        if reference.endswith((".yaml", ".yml")) or "/" in reference:
            raise ShortstackError(f"no recipe file {reference}. Name a YAML file or a shipped one.")
        raise unknown("recipe", reference, shipped_recipes())
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ShortstackError(f"{reference} is not YAML: {one_line(str(error), 200)}") from None
    return parse_recipe(data, reference)


def part(kind: type[Part], **fields: Any) -> Part:
    """One section of a recipe, from the command line. Raises ShortstackError for a bad value."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain("command line", error) from None


def parse_recipe(data: Any, name: str) -> Recipe:
    """Check a recipe's data; relative names of files stay as the user wrote them."""
    if not isinstance(data, dict):
        raise ShortstackError(f"{name}: a recipe is a mapping with the keys {_keys(Recipe)}.")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(name, error) from None
    _check_parts(recipe, name)
    for wanted in recipe.export:
        _check_quantized(recipe, wanted, name)
    slugs = [recipe.slug(wanted) for wanted in recipe.export]
    twice = sorted({slug for slug in slugs if slugs.count(slug) > 1})
    if twice:
        raise ShortstackError(f"{name}: export {twice[0]} is listed twice. Remove one.")
    return recipe


def _check_parts(recipe: Recipe, name: str) -> None:
    """Refuse a recipe that lacks what its steps read."""
    given = recipe.model_fields_set
    if recipe.prune is None and recipe.exits is None:
        if recipe.early_exit is None:
            raise ShortstackError(
                f"{name}: there is nothing to do. Add prune, exits or early_exit."
            )
        if recipe.export:
            raise ShortstackError(
                f"{name}: export is of pruned models and of exits, and there are none. Leave it "
                "out, or add prune or exits."
            )
    else:
        for key in ("text", "export"):
            if key not in given:
                raise ShortstackError(f"{name}: {key} is missing. Add it.")
        if not recipe.export:
            raise ShortstackError(f"{name}: export is empty. Name at least one target.")
    for key in ("repair", "heal"):
        if recipe.prune is None and getattr(recipe, key) is not None:
            raise ShortstackError(f"{name}: {key} mends a cut, and there is no prune step. Add it.")


def _check_quantized(recipe: Recipe, wanted: ExportRecipe, name: str) -> None:
    """Refuse an export whose source there is not, or that would round the codes again."""
    if recipe.quantize is None:
        if wanted.quantized:
            raise ShortstackError(
                f"{name}: export {wanted.to} is quantized: true, but there is no quantize step. "
                "Add one, e.g. quantize: {bits: 4.5}."
            )
        return
    if wanted.spec.format == "packed" and not recipe.takes_codes(wanted):
        raise ShortstackError(
            f"{name}: beside a quantize step, packed is of the quantized models. "
            "Leave quantized: false out."
        )
    if recipe.takes_codes(wanted) and wanted.to not in KEEPS_CODES:
        raise ShortstackError(
            f"{name}: export {wanted.to} would round the quantized weights again. "
            f"quantized: true goes with {', '.join(KEEPS_CODES)}."
        )


def _keys(model: type[BaseModel]) -> str:
    return ", ".join(model.model_fields)


_UNION_TAGS = ("TextRecipe", "str", "int", "list[int]")
"""What pydantic puts into a location for the branch of a union; no key of ours is named so."""


def _explain(name: str, error: ValidationError) -> ShortstackError:
    """One line for the first problem, in the recipe's words."""
    problems = error.errors(include_url=False)
    # The text field accepts two shapes; report the problem of the shape that the user chose.
    chosen = [p for p in problems if not (p["type"] == "string_type" and "str" in p["loc"])]
    # A misspelt key also leaves one missing: the misspelling is the better news.
    first = min(chosen or problems, key=lambda problem: problem["type"] != "extra_forbidden")
    loc: Sequence[int | str] = [p for p in first["loc"] if p not in _UNION_TAGS]
    where = ".".join(str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        model = _model_at(loc[:-1])
        wrong = unknown("key", str(loc[-1]), model.model_fields)
        at = ".".join(str(part) for part in loc[:-1]) or "the top level"
        return ShortstackError(f"{name}: in {at}: {wrong}")
    if first["type"] == "missing":
        return ShortstackError(f"{name}: {where} is missing. Add it.")
    if first["type"] == "value_error":
        return ShortstackError(f"{name}: {where}: {first['msg'].removeprefix('Value error, ')}.")
    return ShortstackError(f"{name}: {where}: {first['msg']}, got {first['input']!r}.")


def _model_at(loc: Sequence[int | str]) -> type[BaseModel]:
    """The model whose keys are valid at a place in the recipe."""
    models: dict[str, type[BaseModel]] = {
        "prune": PruneRecipe,
        "repair": RepairRecipe,
        "heal": HealRecipe,
        "exits": ExitsRecipe,
        "early_exit": EarlyExitRecipe,
        "quantize": QuantizeRecipe,
        "export": ExportRecipe,
        "calibration": CalibrationRecipe,
        "verify": VerifyRecipe,
        "bench": BenchRecipe,
        "text": TextRecipe,
    }
    return models[str(loc[0])] if loc else Recipe
