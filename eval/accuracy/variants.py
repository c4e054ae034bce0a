"""Variants: the ways to run a patched model that an evaluation compares with stock.

A variant is the options of `hf_fastattn.patch`, whether rows share their prompt's pages, and whether the device's loop has
to run. Backends are read off `FastAttnConfig`, so a new one is evaluated from the day it exists.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import hf_fastattn
from hf_fastattn import config as options_module
from hf_fastattn.config import FastAttnConfig
from hf_fastattn.eval.accuracy.loop_feed import why_no_loop
from hf_fastattn.eval.choices import SHARING_FAULTS, STEP_FAULTS

# Options that are on or off and change what is computed.
SWITCHES = ("batch_invariant", "cuda_graphs", "prefix_cache")


@dataclass(frozen=True)
class Variant:
    """Options of `patch`, and how texts are fed.

    Attributes:
        share: each row runs beside copies that share its pages and then go their own way.
        loop: in the loop that the device drives; else in forwards, and in Transformers' own loop over them.
        alone: each row in a call of its own, whose steps take other kernels on a GPU.
    """

    options: tuple[tuple[str, Any], ...] = ()
    share: bool = False
    loop: bool = False
    alone: bool = False

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        words = [f"{key}={value}" for key, value in self.options]
        words += ["loop=on"] * self.loop + ["alone=on"] * self.alone
        return ",".join([*words, f"share={'on' if self.share else 'off'}"])


def parse(text: str) -> Variant:
    """`backend=triton,page_size=64,share=on` as a variant.

    Raises:
        ValueError: an option is unknown, its value is out of range, or rows are alone and share, or not in the loop.
    """
    known = {field.name for field in fields(FastAttnConfig)} | {"share", "loop", "alone"}
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, _, value = item.partition("=")
        if key not in known or not value:
            raise ValueError(f"{item!r} is no option=value; the options are {sorted(known)}")
        options[key] = _value(value)
    share, loop, alone = (bool(options.pop(name, False)) for name in ("share", "loop", "alone"))
    if alone and (share or not loop):
        raise ValueError(f"{text!r}: rows that are alone share nothing, and run in the device's loop; use loop=on,alone=on")
    try:
        FastAttnConfig(**options)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return Variant(tuple(sorted(options.items())), share, loop, alone)


def _value(text: str) -> Any:
    switches = {"on": True, "off": False, "true": True, "false": False, "none": None}
    if text.lower() in switches:
        return switches[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def default_variants(model: Any) -> list[Variant]:
    """Every backend that takes this model where it is: sharing off and on, by forwards and in the device's loop; each switch
    that changes what is computed, thrown by itself; on a GPU rows alone; and one other page size."""
    found: list[Variant] = []
    looped = why_no_loop(model) is None
    for backend in options_module.BACKENDS[1:]:
        if not is_usable(model, {"backend": backend}):
            continue
        plain = {"backend": backend}
        found += [
            _variant(plain, share, loop) for loop in ((False, True) if looped else (False,)) for share in (False, True)
        ]
        found += [replace(found[-2], alone=True)] * (looped and model.device.type == "cuda")
        for switch in SWITCHES:
            thrown = {**plain, switch: not getattr(FastAttnConfig(), switch)}
            loop = looped and switch != "cuda_graphs"
            if is_usable(model, thrown):
                found.append(_variant(thrown, True, loop))
    size = 64 if FastAttnConfig().page_size != 64 else 16
    return [*found, _variant({**dict(found[0].options), "page_size": size}, False, False)]


def _variant(options: dict[str, Any], share: bool, loop: bool) -> Variant:
    return Variant(tuple(sorted(options.items())), share, loop)


def with_format(chosen: Sequence[Variant], kv_dtype: str | None) -> list[Variant]:
    """The variants with this `kv_dtype` in place of what they say of it; as they are, if it is None."""
    if kv_dtype is None:
        return list(chosen)
    wanted = [tuple(sorted({**dict(held.options), "kv_dtype": kv_dtype}.items())) for held in chosen]
    return [replace(held, options=options) for held, options in zip(chosen, wanted, strict=True)]


def is_usable(model: Any, options: dict[str, Any]) -> bool:
    """Whether these options can be asked for, do not refuse this model on its device, and mean something there."""
    if "cuda_graphs" in options and model.device.type != "cuda":
        return False
    try:
        with hf_fastattn.patched(model, **options):
            hf_fastattn.report(model)
    except ValueError:
        return False
    return True


def chosen(texts: Sequence[str] | None, model: Any, fault: str | None = None) -> list[Variant]:
    """The variants of the command line, or the default ones, if a fault is to be planted those of them that it reaches.

    Hooks keep calls off the device's loop; what only its steps read is in rows that share prefixes, and most of it in rows
    alone. Where the command line names none that a fault reaches, it gets what it names.
    """
    named = [parse(text) for text in texts] if texts else []
    found = named or default_variants(model)
    if fault == "window" and not named:
        # Whose pages are larger has none to lose.
        window = model.config.sliding_window
        found = [variant for variant in found if dict(variant.options).get("page_size", FastAttnConfig().page_size) < window]
    if fault in STEP_FAULTS:
        plain = [variant for variant in found if variant.share or (variant.alone and fault not in SHARING_FAULTS)]
        plain = [variant for variant in plain if variant.loop]
        return [variant for variant in plain if named or len(variant.options) == 1] or named
    return [variant for variant in found if not (fault and variant.loop)] or named
