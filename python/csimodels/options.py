"""What options of commands mean: those that were not given, and where pre-trained weights come from."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def replace_given(config: Config, **options: Any) -> Config:
    """The dataclass with the fields that were given; None leaves a field as it is."""
    given = {name: value for name, value in options.items() if value is not None}
    return dataclasses.replace(config, **given)


def family_and_source(text: str, expected: str) -> tuple[str, str]:
    """``"family:source"`` of a backbone -> both.

    Raises:
        ValueError: another text; it tells that ``expected`` was.
    """
    family, separator, source = text.partition(":")
    if not separator or not source:
        raise ValueError(f"backbone: expected {expected}, got {text!r}")
    return family, source
