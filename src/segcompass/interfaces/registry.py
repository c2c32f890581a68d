"""Interfaces by name. A new one is a file in this folder that registers its class."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from typing import Any, TypeVar

from pydantic import BaseModel, Field, SerializeAsAny, field_validator
from pydantic_core.core_schema import ValidationInfo

import segcompass.interfaces
from segcompass.interfaces.base import Interface, InterfaceConfig
from segcompass.io.errors import ConfigError

INTERFACES: dict[str, type[Interface]] = {}
K = TypeVar("K", bound=type[Interface])


def register(kind: K) -> K:
    """Class decorator: makes an interface known by its ``name``."""
    INTERFACES[kind.name] = kind
    return kind


def find(name: str) -> type[Interface]:
    """An interface by its name.

    Raises:
        ConfigError: naming the interfaces there are.
    """
    here = {module.name for module in pkgutil.iter_modules(segcompass.interfaces.__path__)}
    if name not in INTERFACES and name in here:  # only our own files are ever imported
        import_module(f"segcompass.interfaces.{name}")
    if name not in INTERFACES:
        known = known_interfaces()
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"no interface {name!r}, there are {', '.join(known)}{hint}")
    return INTERFACES[name]


def known_interfaces() -> list[str]:
    """The names of all interfaces."""
    for module in pkgutil.iter_modules(segcompass.interfaces.__path__):
        import_module(f"segcompass.interfaces.{module.name}")
    return sorted(INTERFACES)


class OfInterface(BaseModel, frozen=True, extra="forbid"):
    """A config that names an interface and holds its settings."""

    interface: str = Field("concept_slots", description="the way of aligning, see interfaces/")
    head: SerializeAsAny[InterfaceConfig] = Field(
        default_factory=dict,
        validate_default=True,
        description="settings of the interface",
    )

    @field_validator("interface")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            return find(value).name
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @field_validator("head", mode="plain")
    @classmethod
    def _fits(cls, value: Any, info: ValidationInfo) -> InterfaceConfig:
        if "interface" not in info.data:  # there is none of that name, which is told by itself
            return InterfaceConfig()
        kind = find(info.data["interface"]).Config
        return value if isinstance(value, kind) else kind.model_validate(value)
