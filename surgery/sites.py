"""The values that travel between the steps: sites, their selection, and the plan.

All of them are frozen, hold names instead of graph nodes, and turn into JSON and back.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

from surgery import decoding
from surgery.chains import Chain
from surgery.errors import CheckpointError, NoSites, PlanMismatch, SitesMismatch, UnknownSite, near, shortened
from surgery.heads import HeadRoles
from surgery.queries import QueryRoles

Kind = Literal["block", "attention", "mlp", "heads"]
Granularity = Literal["sample", "token", "prefill"]
Layout = Literal["NC", "NTC", "NCT", "NHWC", "NCHW", "other"]
CHANNELS_FIRST: tuple[Layout, ...] = ("NCHW", "NCT")
"""Layouts of feature maps of convolutions, whose positions follow their channels."""
SkipKind = Literal["identity", "affine", "low-rank", "linear", "depthwise", "narrow"]
Routers = Literal["own", "shared"]
Cost = Literal["flops", "latency"]

KINDS: tuple[Kind, ...] = ("block", "attention", "mlp", "heads")
PLAN_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RegionInput:
    """One value that a branch reads.

    `batch_axis` / `token_axis` say along which axis it is cut when samples / tokens are left out; None means that it is
    shared by all of them. Where `sequence_first`, the branch reads it as `(T, N, ...)` and the axes are those of
    `(N, T, ...)`, as a gate sees it.
    """

    name: str
    batch_axis: int | None = None
    token_axis: int | None = None
    sequence_first: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """One residual branch whose work may be skipped.

    Args:
        name: Qualified name, as in `model.get_submodule` wherever the branch is one module.
        kind: block, attention, mlp or heads.
        host: Name of the module whose `forward` contains the add ("" for the model itself).
        flops: Dense forward of the branch per sample at the example's shape; one multiply-add = 2.
        share: `flops` as a fraction of the model's.
        parameters: Number of parameters in the branch.
        granularities: What the probes allow: `sample`, `token`, then `prefill`; empty never occurs.
        layout: Layout of the residual stream here.
        channels: Width `C` of the residual stream here.
        positions: Tokens (or spatial positions) per sample at the example's shape.
        inputs: What the branch reads, in call order.
        modules: Names of the modules that the branch calls.
        anchor: Names of the modules and tensors that it uses, which identify it in another trace.
        query: How attention runs for some query tokens only, or None.
        shared: Whether a further output of the branch is read outside (T5's position bias), so that it runs whatever is
            decided.
        folded: Whether samples and tokens share the first axis of the residual stream here, `(N * T, C)` (OPT).
        sequence_first: Whether tokens come before samples in the residual stream here, `(T, N, C)`, as in torch's transformer
            layers by default; `layout` and all that a gate sees are then those of the stream turned to `(N, T, C)`.
        heads: Where the heads are that a site of kind `heads` decides, else None.
        chain: The layers of the branch where they are a chain (`surgery.chains`), else None.
    """

    name: str
    kind: Kind
    host: str
    flops: int
    share: float
    parameters: int
    granularities: tuple[Granularity, ...]
    layout: Layout
    channels: int
    positions: int
    inputs: tuple[RegionInput, ...] = ()
    modules: tuple[str, ...] = ()
    anchor: tuple[str, ...] = ()
    query: QueryRoles | None = None
    shared: bool = False
    folded: bool = False
    sequence_first: bool = False
    heads: HeadRoles | None = None
    chain: Chain | None = None

    RETIRED: ClassVar[tuple[str, ...]] = ("restriction",)
    """Keys of older files."""

    @property
    def units(self) -> tuple[str, ...]:
        """Names of what is decided for one sample or token: the site, or each of its heads (`blocks.3.attn.heads.0`)."""
        return (self.name,) if self.heads is None else tuple(f"{self.name}.{i}" for i in range(self.heads.count))


def is_in_first(layers: int, site: Site) -> bool:
    """Whether the first number in the site's name, as in `model.layers.0.mlp`, is below `layers`."""
    number = next((int(part) for part in site.name.split(".") if part.isdigit()), None)
    return number is not None and number < layers


@dataclass(frozen=True, slots=True)
class Rejection:
    """A place that was looked at and left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class SitePlan:
    """What is done at one site; `always_on` ones run unless they are forced not to, and have no router at work.

    `rank` is that of low-rank skip paths, and the hidden channels of narrow ones. `leader` is the name of the site whose router's
    hidden features this one's router reads, or "" where it has its own.
    """

    site: Site
    granularity: Granularity
    skip: SkipKind
    rank: int = 0
    hidden: int = 16
    always_on: bool = False
    leader: str = ""

    def may_lead(self, other: SitePlan) -> bool:
        """Whether the router of `other`, a later site, may read what this one's makes of the same call's stream.

        The module that holds the sum of `other` holds that of this one too, itself or in a module of its own (BERT).
        """
        mine, theirs = self.site, other.site
        inside = is_within(mine.host, theirs.host)
        shape = ("layout", "channels", "positions", "folded", "sequence_first")
        same = all(getattr(mine, n) == getattr(theirs, n) for n in shape)
        alike = self.granularity == other.granularity and self.hidden == other.hidden
        free = not (self.leader or self.always_on or other.always_on)
        return inside and same and alike and free and mine.kind == "attention" and theirs.kind == "mlp"


def is_within(name: str, module: str) -> bool:
    """Whether the module called `name` is `module` or a part of it."""
    return module in ("", name) or name.startswith(f"{module}.")


NO_ADD = "no branch is added to a residual stream anywhere"


class Sites(Sequence[Site]):
    """What can be skipped in one model: a sequence of `Site` that prints as a table.

    `model_flops` is the dense model's FLOPs per sample at the example's shape. `signature` records the example's names,
    shapes, dtypes and Nones; `patterns` how each host was called; `inlined` which modules were traced through. `heads` are
    the sites of kind `heads`, which are chosen only where they are asked for (`sites.filter(kind="heads")`) and then take
    the place of the attention branch that they are in; `heads_rejections` says where there are none and why. `causal` says
    whether the model is a causal language model that can generate.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        rejections: Iterable[Rejection] = (),
        *,
        heads: Iterable[Site] = (),
        heads_rejections: Iterable[Rejection] = (),
        model_name: str = "",
        model_flops: int = 0,
        model_parameters: int = 0,
        signature: Mapping[str, Any] | None = None,
        patterns: Mapping[str, Any] | None = None,
        inlined: Iterable[str] = (),
        causal: bool = False,
    ) -> None:
        self._sites = tuple(sites)
        self.rejections = tuple(rejections)
        self.heads = tuple(heads)
        self.heads_rejections = tuple(heads_rejections)
        self.model_name = model_name
        self.model_flops = model_flops
        self.model_parameters = model_parameters
        self.signature = dict(signature or {})
        self.patterns = dict(patterns or {})
        self.inlined = tuple(inlined)
        self.causal = causal

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> Sites: ...
    def __getitem__(self, key: int | str | slice) -> Site | Sites:
        if isinstance(key, slice):
            return self._with(self._sites[key])
        if isinstance(key, str):
            for site in (*self._sites, *self.heads):
                if site.name == key:
                    return site
            names = (*self.names, *(site.name for site in self.heads))
            raise UnknownSite(
                f"{self.model_name or 'this model'} has no site {key!r}{near(key, names)}; there are: {shortened(names)}"
            )
        return self._sites[key]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of execution."""
        return tuple(site.name for site in self._sites)

    def filter(self, *patterns: str, kind: Kind | Iterable[Kind] | None = None) -> Sites:
        """Keep the sites of the given kinds whose name matches one of the glob `patterns`.

        Without `kind`, sites of kind `heads` are kept only where a pattern that ends in `heads` matches. Where the heads
        of an attention are kept, the branch around them is not: one attention has one gate.

        Raises:
            NoSites: If nothing is left.
        """
        kinds = {kind} if isinstance(kind, str) else set(kind or KINDS)

        def wanted(site: Site) -> bool:
            if site.kind != "heads" or kind is not None:
                asked, by_default = list(patterns), not patterns
            else:
                asked, by_default = [p for p in patterns if p.endswith("heads")], False
            return site.kind in kinds and (by_default or any(fnmatch.fnmatchcase(site.name, p) for p in asked))

        inside = {(site.host, site.anchor): site for site in self.heads if wanted(site)}
        chosen = [inside.get((site.host, site.anchor), site) for site in self._sites]
        kept = [site for site in chosen if (site.host, site.anchor) in inside or wanted(site)]
        if not kept:
            raise NoSites(
                f"no site of {self.model_name} is {_asked(patterns, None if kind is None else kinds)}; "
                f"found: {shortened([f'{s.name} ({s.kind})' for s in (*self._sites, *self.heads)])}"
                + "".join(f"; {r.where}: {r.reason}" for r in self.heads_rejections if "heads" in kinds)
                + "".join(near(p, (*KINDS, *self.names)) for p in patterns)
                + "; ask for kinds and name patterns of these, as in 'mlp' or 'blocks.3.*'"
            )
        return self._with(kept)

    def expect(self, count: int) -> Sites:
        """Return self if there are exactly `count` sites.

        Raises:
            SitesMismatch: Otherwise, naming what was found.
        """
        if len(self) != count:
            raise SitesMismatch(
                f"{self.model_name}: expected {count} sites, found {len(self)}: {', '.join(self.names) or 'none'}"
            )
        return self

    def plan(
        self,
        *,
        granularity: Granularity | Literal["auto"] = "auto",
        skip: SkipKind | Literal["auto"] = "auto",
        rank: int = 16,
        width: float | Literal["auto"] = "auto",
        hidden: int | Literal["auto"] = "auto",
        first_tokens: int | Literal["auto"] = "auto",
        first_layers: int | Literal["auto"] = "auto",
        trained: bool = False,
        routers: Routers = "own",
        cost: Cost = "flops",
        budget: float | None = None,
    ) -> Plan:
        """Choose granularity, skip path and router size for every site.

        Args:
            granularity: `auto` takes the finest that the probes allow; `token` and `sample` apply where allowed; `prefill`
                (once per sequence, from the prompt) is for causal language models.
            skip: Kind of skip path (docs/skip_paths.md). `auto`, per token: the identity; where paths will be trained, `narrow`
                for chains of up to 4,096 hidden channels (if `cost` is `flops` and `budget` 0.4 or more) and `low-rank` for the
                rest, unless that costs more than 0.1 of the branch. Else `narrow` on feature maps where branches are chains,
                `cost` is `flops` and they reach the `budget`; else the first of `depthwise` (feature maps only, and not where
                `cost` is `latency`) and `linear` that costs at most 0.15 of its branch and holds at most 0.1 of its parameters,
                else per-channel affine. `depthwise` means `linear` where the stream is no feature map, and `narrow` what `auto`
                takes where the branch is no chain.
            rank: Rank of `low-rank` skip paths.
            width: Share of a branch's hidden channels that `narrow` skip paths keep, in (0, 1); `auto` keeps what costs a share
                of the branch that goes by the `budget` (docs/skip_paths.md), and is 0.5 where there is none. Per token it keeps
                an eighth, and in MLPs that are not gated at most a quarter as many as the stream has channels.
            hidden: Width of the routers' bottleneck; `auto` keeps a router within its cost limit.
            first_tokens: For how many first tokens of every sequence all gates per token stay open; `auto` is none.
            first_layers: In how many first layers all gates stay open; `auto` is none.
            trained: Whether skip paths will be trained.
            routers: `shared` lets an MLP's router read the hidden features of the attention's before it in the same
                layer, where both decide alike (docs/routers.md); `own` gives each site its own.
            cost: What budgets will count.
            budget: The smallest one that matters, as a fraction of the dense model's cost, or None where it is not known.

        Raises:
            NoSites: If there is nothing to plan.
            SurgeryError: If `granularity`, `skip`, `routers` or `cost` is none of the kinds above, or a number is out of range.
        """
        from surgery.planning import choose

        if not self._sites:
            raise NoSites(
                f"{self.model_name} has no sites: "
                + (shortened([f"{r.where}: {r.reason}" for r in self.rejections], 6) if self.rejections else NO_ADD)
                + "; what is not added to a residual stream cannot be skipped (docs/limits.md)"
            )
        return choose(
            self,
            granularity=granularity,
            skip=skip,
            rank=rank,
            width=width,
            hidden=hidden,
            first_tokens=first_tokens,
            first_layers=first_layers,
            trained=trained,
            routers=routers,
            cost=cost,
            budget=budget,
        )

    def _with(self, sites: Iterable[Site]) -> Sites:
        return Sites(
            sites,
            self.rejections,
            heads=self.heads,
            heads_rejections=self.heads_rejections,
            model_name=self.model_name,
            model_flops=self.model_flops,
            model_parameters=self.model_parameters,
            signature=self.signature,
            patterns=self.patterns,
            inlined=self.inlined,
            causal=self.causal,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            "model": self.model_name,
            "model_flops": self.model_flops,
            "model_parameters": self.model_parameters,
            "sites": [dataclasses.asdict(site) for site in self._sites],
            "rejections": [dataclasses.asdict(r) for r in self.rejections],
            "heads": [dataclasses.asdict(site) for site in self.heads],
            "heads_rejections": [dataclasses.asdict(r) for r in self.heads_rejections],
        }

    def __rich__(self) -> Any:
        from surgery.tables import sites_table

        return sites_table(self)

    def __str__(self) -> str:
        from surgery.tables import render

        return render(self.__rich__())

    def __repr__(self) -> str:
        return f"<Sites of {self.model_name}: {len(self)} found, {len(self.rejections)} rejected>"


def _asked(patterns: Sequence[str], kinds: set[Kind] | None) -> str:
    """What a filter asked for, in words."""
    words = [] if kinds is None else [f"of kind {' or '.join(sorted(kinds))}"]
    words += [f"named {' or '.join(patterns)}"] if patterns else []
    return " and ".join(words) or "chosen by default"


@dataclass(frozen=True, slots=True)
class Plan:
    """The serialisable choice: everything that is needed to insert the same gates again, without real values."""

    sites: tuple[SitePlan, ...]
    model_name: str
    model_flops: int
    signature: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patterns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inlined: tuple[str, ...] = ()
    format_version: int = PLAN_FORMAT
    first_tokens: int = 0
    """For how many first tokens of every sequence all gates per token are open."""

    def __post_init__(self) -> None:
        names = [planned.site.name for planned in self.sites]
        if len(set(names)) != len(names):
            raise PlanMismatch(f"plan for {self.model_name} names a site twice: {sorted(names)}")
        for planned in self.sites:
            if planned.granularity not in planned.site.granularities:
                raise PlanMismatch(
                    f"{planned.site.name}: granularity {planned.granularity!r} is not allowed by its probes; "
                    f"allowed: {', '.join(planned.site.granularities)}"
                )
        earlier: dict[str, SitePlan] = {}
        for planned in self.sites:
            leader = earlier.get(planned.leader)
            if planned.leader and (leader is None or not leader.may_lead(planned)):
                raise PlanMismatch(
                    f"{planned.site.name}: its router cannot share that of {planned.leader!r}, which must be an attention site "
                    "before it in the same module, with a router of its own, the same granularity and the same width; "
                    "plan with routers='own'"
                )
            earlier[planned.site.name] = planned

    @property
    def names(self) -> tuple[str, ...]:
        """Site names in the order of execution."""
        return tuple(planned.site.name for planned in self.sites)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of everything that is decided, in the order of execution: sites, and heads one by one."""
        return tuple(unit for planned in self.sites for unit in planned.site.units)

    @property
    def always_on(self) -> tuple[str, ...]:
        """What of `units` is open for everything unless it is forced."""
        return tuple(unit for planned in self.sites if planned.always_on for unit in planned.site.units)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists, as they do on disk

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`.

        Raises:
            CheckpointError: If the form is newer than this version, or damaged.
        """
        cls.check_version(data.get("format_version"))
        plan: Plan = decoding.read(cls, dict(data), "plan")
        return plan

    @staticmethod
    def check_version(version: object) -> None:
        """Refuse a newer form before anything else of it is read.

        Raises:
            CheckpointError: If it is newer, or no number.
        """
        if not isinstance(version, int) or version > PLAN_FORMAT:
            raise CheckpointError(
                f"plan has format version {str(version)[:60]!r}, this version of bypass-surgery reads up to {PLAN_FORMAT}: "
                "pip install -U bypass-surgery"
            )
