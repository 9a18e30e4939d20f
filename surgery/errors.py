"""Every error that Bypass Surgery raises on purpose.

Each message says what happened, where, what was expected and found, and the next step. `docs/errors.md` lists them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import TypeGuard


class SurgeryError(Exception):
    """Base of all errors of this package."""


class UnsupportedModel(SurgeryError):
    """The model cannot be converted at all (no sites, meta device, not a module)."""


class NoSites(UnsupportedModel):
    """Nothing that can be skipped was found, or the selection left none."""


class AlreadyConverted(SurgeryError):
    """The model given already carries gates."""


class NotConverted(SurgeryError):
    """A function for gated models was given a model without gates."""


class TraceError(SurgeryError):
    """A `forward` cannot be traced; it is then treated as one opaque module."""


class SitesMismatch(SurgeryError):
    """Sites found differ from the sites expected (by a plan, a config's depth or a selection)."""


class PlanMismatch(SurgeryError):
    """A plan does not fit the model that it is applied to."""


class UnknownSite(SurgeryError, KeyError):
    """A name that is neither a site nor a module that was rewritten."""

    def __str__(self) -> str:  # `KeyError` shows its message in quotes
        return Exception.__str__(self)


class BudgetError(SurgeryError, ValueError):
    """A budget outside (0, 1] or outside the attainable range."""


class DataError(SurgeryError, ValueError):
    """Data that yields nothing, has wrong shapes or dtypes, holds NaN, or can be read only once."""


class CheckpointError(SurgeryError):
    """A checkpoint directory that is missing, damaged, of another model, or of a newer format."""


class BaseMismatch(CheckpointError):
    """The base weights are not those that the checkpoint was made from."""


class HubError(SurgeryError):
    """The Hugging Face Hub refuses, has no such repository, or cannot be reached."""


class OutputExists(SurgeryError, FileExistsError):
    """The output directory exists and overwriting was not asked for."""


class UnknownModel(SurgeryError, ValueError):
    """A `MODEL` string that names no known model."""


class MissingDependency(SurgeryError, ImportError):
    """An optional library is needed; the message is the install line."""


class ForceError(SurgeryError, ValueError):
    """Forced decisions that name unknown sites or have the wrong shape or dtype."""


class PromptError(SurgeryError):
    """Decisions per prompt where nobody knows what the prompt is, or a cache that does not go with them."""


class PinError(SurgeryError):
    """A gated model cannot be fixed to one way of being called."""


class ExportError(SurgeryError):
    """A program cannot be written in the format asked for."""


class LogError(SurgeryError):
    """A log of decisions that cannot be written, is damaged, or is of another model."""


def near(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a message: `; did you mean …?` where something like `name` is among `names`, else `otherwise`."""
    return did_you_mean(get_close_matches(name, list(dict.fromkeys(names)), 3), otherwise)


def did_you_mean(names: Iterable[object], otherwise: str = "") -> str:
    """The end of a message: `; did you mean …?` with all `names`, or `otherwise` where there are none."""
    found = " or ".join(str(name) for name in names)
    return f"; did you mean {found}?" if found else f"; {otherwise}" if otherwise else ""


def first_line(error: BaseException, otherwise: str = "no message") -> str:
    """What an error says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), otherwise)


def shortened(names: Sequence[str], count: int = 12) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `SurgeryError` unless `value`, given for the argument `name`, is one of `choices`."""
    if value not in choices:
        raise SurgeryError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def check_budget(budget: float) -> float:
    """The budget as a plain float; raise `BudgetError` unless it is a number in (0, 1], numpy's or a tensor of one included."""
    number: object = budget
    if not isinstance(budget, Real) and hasattr(budget, "item") and math.prod(getattr(budget, "shape", (0,))) == 1:
        number = budget.item()
    if not is_number(number) or not 0 < number <= 1:
        raise BudgetError(f"budget is the mean cost as a fraction of the dense model's, in (0, 1]; got {budget!r}")
    return float(number)


def check_count(name: str, value: object, smallest: int | None = None) -> None:
    """Raise `SurgeryError` unless `value`, given for the argument `name`, is a whole number, of at least `smallest`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (smallest is not None and isinstance(value, int) and value < smallest):
        least = "" if smallest is None else f" of at least {smallest}"
        raise SurgeryError(f"{name} must be a whole number{least}, got {value!r}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number that is neither infinite nor none (NaN)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
