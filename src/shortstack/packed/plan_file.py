"""A plan on disk: which form each matrix of one packed model is held in, and what that measured."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shortstack.errors import ShortstackError, one_line

Form = Literal["direct", "lean", "int8", "stream", "plain"]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=0)]


class CurvePoint(BaseModel):
    """One plan of the curve. `measured_s`: a token decoded under it; None where only predicted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_bytes: Size
    predicted_s: Seconds
    measured_s: Seconds | None = None
    share_of_int8: Ratio
    slowdown: Ratio
    forms: dict[str, int]


class PlanFile(BaseModel):
    """What `shortstack fit-packed` writes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    model_sha256: str
    device: str
    threads: Annotated[int, Field(ge=1)]
    workers: Annotated[int, Field(ge=0)]
    dtype: str
    int8_bytes: Size
    int8_s: Seconds
    chosen: CurvePoint
    curve: list[CurvePoint]
    forms: dict[str, Form]

    def forms_for(self, sha256: str, matrices: Collection[str]) -> dict[str, str]:
        """Matrix -> form. Raises ShortstackError where the plan is another model's."""
        if sha256 != self.model_sha256 or set(matrices) != set(self.forms):
            raise ShortstackError(
                f"the plan is of the packed model {self.model_sha256[:12]}, this one is "
                f"{sha256[:12]}. Make a plan of it: shortstack fit-packed MODEL -o plan.json"
            )
        return dict(self.forms)


def read_plan(path: Path) -> PlanFile:
    """Read what `fit-packed` wrote. Raises ShortstackError for a file that is no plan."""
    try:
        return PlanFile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShortstackError(f"{path} cannot be read: {error.strerror}. Check the path.") from None
    except (ValidationError, ValueError) as error:
        fact: Any = error.errors()[0] if isinstance(error, ValidationError) else {"msg": str(error)}
        place = ".".join(map(str, fact.get("loc", ())))
        raise ShortstackError(
            f"{path} is no plan of a packed model: {place} {one_line(fact['msg'], 200)}. "
            "Make one: shortstack fit-packed MODEL -o plan.json"
        ) from None
