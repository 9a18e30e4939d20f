"""What a plan that somebody else wrote may say: names, sizes and call patterns, refused by name before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from surgery.chains import Chain
from surgery.errors import CheckpointError
from surgery.patterns import Pattern
from surgery.rewriting import empty_gates
from surgery.sites import Layout, Plan, Site, SitePlan
from surgery.state import Healing

LIMITS: Mapping[str, tuple[int, int]] = {
    "channels": (1, 2**22),
    "hidden": (1, 2**16),
    "rank": (0, 2**16),
    "heads": (1, 4096),
    "kernel": (0, 31),
    "sites": (1, 100_000),
    "characters": (0, 500),
    "count": (0, 2**62),
    "first_tokens": (0, 2**16),
}
"""Smallest and largest values; what is outside is no network."""
FLOATS = ("F64", "F32", "F16", "BF16")
_KIND = re.compile(
    r"none|true|false|object|float|int|enum:.*|tensor:\d{1,2}|typed:[a-z0-9_]{1,20}:\d{1,2}|str:.*|int:-?\d{1,18}|ints:-?\d{1,18}(,-?\d{1,18})*"
    r"|sized:\d{1,2}:\d{1,18}(,\d{1,18})*",
    re.DOTALL,
)


def vet(plan: Plan) -> None:
    """Refuse a plan that no conversion can have made.

    Raises:
        CheckpointError: By the name of what is wrong.
    """
    _within("sites", len(plan.sites), "the plan")
    _within("first_tokens", plan.first_tokens, "the plan")
    for index, planned in enumerate(plan.sites):
        where = f"plan.sites[{index}]"
        for name in _names(planned.site):
            _vet_name(name, where)
        for key, value in (("channels", planned.site.channels), ("hidden", planned.hidden), ("rank", planned.rank)):
            _within(key, value, where)
        _vet_chain(planned, where)
        if planned.site.heads is not None:
            _within("heads", planned.site.heads.count, where)
        for key in ("flops", "parameters", "positions"):
            _within("count", getattr(planned.site, key), f"{where}.{key}")
        if planned.site.host not in plan.patterns:
            raise CheckpointError(f"{where}: plan.patterns lacks its host {planned.site.host!r}")
    for host, patterns in plan.patterns.items():
        _vet_patterns(host, patterns)


def vet_healing(healing: Healing | None) -> None:
    """Refuse changes to the backbone that no healing can have made.

    Raises:
        CheckpointError: By the name of what is wrong.
    """
    if healing is None:
        return
    low_rank = healing.kind == "lora"
    if not healing.shapes:
        raise CheckpointError("healing.shapes names no parameter")
    if low_rank != (healing.rank > 0):
        raise CheckpointError(f"healing.rank must be {'positive' if low_rank else '0'}, got {healing.rank}")
    _within("rank", healing.rank, "healing")
    for name, shape in healing.shapes.items():
        _vet_name(name, "healing.shapes")
        if not name.rpartition(".")[2].isidentifier() or len(shape) != (2 if low_rank else 1):
            raise CheckpointError(f"healing.shapes: {name[:60]!r} of shape {shape} is no parameter of {healing.kind}")
        for length in shape:
            _within("channels", length, f"healing.shapes[{name!r}]")


def expected_tensors(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what the gates of a plan hold, without its network."""
    found = {}
    for host, gates in empty_gates(plan):
        for key, tensor in gates.state_dict().items():
            found[f"{host}.{key}" if host else key] = tuple(tensor.shape)
    return found


def vet_tensors(file: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the header of a safetensors file with what is expected; no tensor is read.

    Raises:
        CheckpointError: If the file is damaged, or lists missing, unexpected and misshapen tensors by name.
    """
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no mapping)
            found = {name: (tuple(one.get_shape()), str(one.get_dtype())) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(file, str(error)) from error
    wrong = [
        f"{name} is {found[name][0]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name][0] != shape
    ]
    wrong += [
        f"{name} holds {kind}, expected {' or '.join(FLOATS)}"
        for name, (_, kind) in found.items()
        if kind not in FLOATS
    ]
    refuse_misfit(file, set(expected) - set(found), set(found) - set(expected), wrong)


def refuse_misfit(file: Path, missing: set[str], unexpected: set[str], wrong: list[str]) -> None:
    """Name every tensor that does not fit.

    Raises:
        CheckpointError: If there is one.
    """
    parts = (("missing", sorted(missing)), ("unexpected", sorted(unexpected)), ("of another shape", wrong))
    found = "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)
    if found:
        raise CheckpointError(f"{file} does not fit its plan: {found}; save the model again")


def damaged(file: Path, detail: str) -> CheckpointError:
    """The error for a file that cannot be what `save` wrote."""
    return CheckpointError(f"{file} is damaged ({detail}); copy or save it again")


def _names(site: Site) -> Iterator[str]:
    yield from (site.name, site.host, *site.modules, *site.anchor, *(one.name for one in site.inputs))
    if site.query is not None:
        yield from (site.query.query, site.query.output)
    if site.heads is not None:
        yield from site.heads.names


def _vet_name(name: str, where: str) -> None:
    _within("characters", len(name), where)
    if not name.isprintable() or "\\" in name or name.startswith(("/", "~")) or ".." in name:
        raise CheckpointError(f"{where}: {name!r} is no name of a module or tensor")


def _vet_chain(planned: SitePlan, where: str) -> None:
    """A chain's layers are those that are read off branches, and a narrow skip path keeps some of its channels."""
    chain = planned.site.chain
    if chain is not None:
        layers = f"{where}.site.chain"
        _within("kernel", chain.middle, layers)
        _within("channels", chain.width, layers)
        if chain.inner:
            _within("channels", chain.inner, layers)
        if not _is_chain(chain, planned.site.layout):
            raise CheckpointError(f"{layers} is no chain of layers")
    if planned.skip == "narrow" and (chain is None or not 1 <= planned.rank <= chain.width):
        raise CheckpointError(f"{where}: a narrow skip path of {planned.rank} channels fits no chain of this site")


def _is_chain(chain: Chain, layout: Layout) -> bool:
    """Whether there can be such layers over the channels of such a stream."""
    if len(chain.activations) != 1 + (chain.middle > 0) or (chain.rms and chain.norm is None):
        return False
    if layout == "NCT":
        return False
    if layout != "NCHW":
        plain = chain.first == chain.middle == chain.last == chain.inner == 0
        return plain and (chain.norm is None or (math.isfinite(chain.norm) and chain.norm >= 0))
    sides = chain.first in (1, 3) and chain.last in (1, 3) and (chain.middle == 0 or chain.middle % 2 == 1)
    return sides and not chain.gated and chain.norm is None and (not chain.inner or chain.middle in (1, 3))


def _vet_patterns(host: str, patterns: object) -> None:
    where = f"plan.patterns[{host!r}]"
    _vet_name(host, where)
    if not isinstance(patterns, list) or not patterns:
        raise CheckpointError(f"{where} must be a list of call patterns")
    for entry in patterns:
        try:
            pattern = Pattern.from_list(entry)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        for kind in (*pattern.named, *pattern.extra, *(kind for _, kind in pattern.keywords)):
            if not isinstance(kind, str) or not _KIND.fullmatch(kind):
                raise CheckpointError(f"{where}: {str(kind)[:60]!r} is no kind of argument")


def _within(key: str, value: int, where: str) -> None:
    low, high = LIMITS[key]
    if not low <= value <= high:
        raise CheckpointError(f"{where}: {value} {key}, expected {low} to {high}")


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
