"""The parts that every section of the configuration is made of: a strict, frozen model, bounded numbers and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, SerializerFunctionWrapHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Word:
    """Metadata of a field `X | None`: TOML has no null, so `word` is written, and dumped, where Python reads None."""

    word: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.wrap_serializer_function_ser_schema(self._dump)
        return core_schema.no_info_before_validator_function(self._read, handler(source), serialization=dump)

    def _read(self, value: Any) -> Any:
        return None if value == self.word else value

    def _dump(self, value: Any, dump: SerializerFunctionWrapHandler) -> Any:
        return self.word if value is None else dump(value)


def word_of(field: FieldInfo) -> str | None:
    """The word that stands for None in the field; None for a field without one."""
    return next((metadata.word for metadata in field.metadata if isinstance(metadata, Word)), None)


OFF = Word("off")
AUTO = Word("auto")


def refuse(problem: str, hint: str = "") -> PydanticCustomError:
    """The error that a validator raises; `parse_config` turns it into a ConfigurationError with the same two fields."""
    return PydanticCustomError("refused", "{message}", {"message": problem, "hint": hint})


class Section(BaseModel):
    """A table of the configuration. An unknown key is an error, and no value changes after it was read."""

    # Built at its first use: most commands use few of the tables, or none.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, defer_build=True)
