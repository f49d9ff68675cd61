"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# A name becomes part of file names and metric names.
Name = Annotated[
    str,
    Field(
        pattern=r"^[^/\s.][^/\s]*$",
        json_schema_extra={"words": "a name without slashes, white space and leading dot"},
    ),
]


class Section(BaseModel):
    """A group of recipe keys: unknown keys are errors, types are not converted, values do not change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
