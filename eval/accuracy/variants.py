"""Variants: the ways to run a patched model that an evaluation compares with stock.

A variant is the options of `hf_fastattn.patch`, and whether rows share their prompt's pages. Backends and switches are
read off `FastAttnConfig`, so a new one is evaluated from the day it exists.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import hf_fastattn
from hf_fastattn import config as options_module
from hf_fastattn.config import FastAttnConfig


@dataclass(frozen=True)
class Variant:
    """Options of `patch`, and `share`: each row runs beside a copy that shares its pages and then goes its own way."""

    options: tuple[tuple[str, Any], ...] = ()
    share: bool = False

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return ",".join([*(f"{key}={value}" for key, value in self.options), f"share={'on' if self.share else 'off'}"])


def parse(text: str) -> Variant:
    """`backend=triton,page_size=64,share=on` as a variant.

    Raises:
        ValueError: an option is unknown, or its value is out of range.
    """
    known = {field.name for field in fields(FastAttnConfig)}
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known | {"share"} or not value:
            raise ValueError(f"{item!r} is no option=value; the options are {sorted(known | {'share'})}")
        options[key] = _value(value)
    share = bool(options.pop("share", False))
    try:
        FastAttnConfig(**options)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return Variant(tuple(sorted(options.items())), share)


def _value(text: str) -> Any:
    switches = {"on": True, "off": False, "true": True, "false": False, "none": None}
    if text.lower() in switches:
        return switches[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def default_variants(model: Any) -> list[Variant]:
    """Every backend that takes this model where it is, with each combination of the other switches that it takes, sharing
    off and on; and one other page size."""
    found = []
    switches = [field.name for field in fields(FastAttnConfig) if field.type in ("bool", bool)]
    for backend in options_module.BACKENDS:
        for values in itertools.product((False, True), repeat=len(switches)):
            options = {"backend": backend, **dict(zip(switches, values, strict=True))}
            if backend != "auto" and is_usable(model, options):
                found += [Variant(tuple(sorted(options.items())), share) for share in (False, True)]
    first = found[0]
    size = 64 if FastAttnConfig().page_size != 64 else 16
    return [*found, Variant(tuple(sorted({**dict(first.options), "page_size": size}.items())))]


def with_format(chosen: Sequence[Variant], kv_dtype: str | None) -> list[Variant]:
    """The variants with this `kv_dtype` in place of what they say of it; as they are, if it is None."""
    if kv_dtype is None:
        return list(chosen)
    return [Variant(tuple(sorted({**dict(held.options), "kv_dtype": kv_dtype}.items())), held.share) for held in chosen]


def is_usable(model: Any, options: dict[str, Any]) -> bool:
    """Whether these options can be asked for, do not refuse this model on its device, and mean something there."""
    if options.get("cuda_graphs") and model.device.type != "cuda":
        return False
    try:
        with hf_fastattn.patched(model, **options):
            hf_fastattn.report(model)
    except ValueError:
        return False
    return True


def chosen(texts: Sequence[str] | None, model: Any) -> list[Variant]:
    """The variants of the command line, or the default ones."""
    return [parse(text) for text in texts] if texts else default_variants(model)
