"""Inserting gates: the class stays, the forward is generated (`surgery.programs`).

The host instance gets a dynamic subclass of its own class with the generated functions, so names in the state dict,
`isinstance`, hooks, gradient checkpointing, `save_pretrained` and `generate` go on working.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from surgery import roots
from surgery.branches import Owners
from surgery.context import state_of
from surgery.copying import share
from surgery.errors import (
    AlreadyConverted,
    CheckpointError,
    PlanMismatch,
    UnknownSite,
    UnsupportedModel,
    near,
    shortened,
)
from surgery.gates import Gate
from surgery.head_gates import HeadGate
from surgery.patterns import Pattern, signature_of
from surgery.programs import Marked, Programs
from surgery.queries import owner
from surgery.sites import Plan, Site, SitePlan, Sites, is_in_first
from surgery.state import CostModel, GatedState, SiteCost
from surgery.tracing import GATES, base_class

_SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel")  # by name, since not every torch has them
_COMPILED = "OptimizedModule"  # by name as well: importing torch's compiler takes seconds


class Gates(nn.Module):
    """The gates of one host, and the state that they share."""

    def __init__(self, state: GatedState) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Any) -> Any:
        """What it is given, for hosts whose own `forward` runs all of their children one after another."""
        return x

    def hang(self, planned: SitePlan, host: str, owners: Owners = ()) -> str:
        """Add the gate of one site; returns its name here. `owners` hold what it finds inside attention."""
        key = _key(planned.site.name, host, self)
        if planned.site.heads is not None:
            self.add_module(key, HeadGate(planned, self.state, owners=owners))
        else:
            self.add_module(key, Gate(planned, self.state, query=owners))
        return key


@torch.inference_mode(False)
def insert_gates(model: nn.Module, plan: Plan | Sites) -> nn.Module:
    """Put gates into a copy of `model` that shares its weights; all of them are open.

    Args:
        model: The dense model; it is not changed. It may be on the meta device.
        plan: What `sites.plan()` gave, or `Sites`, short for `sites.plan()`.

    Returns:
        A module of the same class, called in the same way, bit-equal to `model` until it is trained or forced.

    Raises:
        AlreadyConverted: If `model` carries gates.
        PlanMismatch: If the plan does not fit the model.
    """
    if isinstance(plan, Sites):
        plan = plan.plan()
    check_convertible(model)
    trainable = _trainable(model)
    modules = dict(model.named_modules())
    unknown = sorted({p.site.host for p in plan.sites} - set(modules))
    if unknown:
        raise PlanMismatch(f"the plan for {plan.model_name} names modules that {type(model).__name__} lacks: {unknown}")
    gated = share(model).eval()
    gate_in_place(gated, plan)
    state_of(gated).trainable = trainable
    for _, gate in _gates(gated):
        gate.eval()
        device = next((p.device for p in gated.parameters()), torch.device("cpu"))
        gate.to(device)
    return gated


def gate_in_place(model: nn.Module, plan: Plan) -> None:
    """Turn `model` itself into a gated model: for one that nobody else holds, such as a copy or one that is being loaded."""
    state = GatedState(plan=plan, costs=flop_costs(plan), threshold=float("-inf"), trainable=_trainable(model))
    with torch.random.fork_rng(devices=[]):  # routers start from random numbers, which are not taken from the caller's
        for host in dict.fromkeys(p.site.host for p in plan.sites):
            install(model, host, [p for p in plan.sites if p.site.host == host], plan, state)
    gates = {gate.site.name: gate for _, gate in _gates(model)}
    for planned in plan.sites:
        if planned.leader:
            gates[planned.site.name].leader = (gates[planned.leader],)
    _make_root(model, state)


def remove(gated: nn.Module) -> nn.Module:
    """The dense model back: a module of the original class without gates, sharing the backbone's weights.

    What required gradients when gates were inserted requires them again.

    Args:
        gated: A gated model; it stays as it is.

    Returns:
        The dense model.

    Raises:
        NotConverted: If the model has no gates.
    """
    trainable = state_of(gated).trainable
    dense = share(gated)
    for module in list(dense.modules()):
        if GATES in module._modules:
            del module._modules[GATES]
        module.__class__ = base_class(module)
    del dense.__dict__["_surgery_state"]
    roots.forget_loading(dense)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in trainable)
    return dense


def show(gated: nn.Module, name: str = "") -> str:
    """The generated code of one host, as readable Python.

    Args:
        gated: A gated model.
        name: Name of a host, of a site in it, or "" for the model itself.

    Returns:
        The code of the host's `forward` and of its branches.

    Raises:
        NotConverted: If the model has no gates.
        UnknownSite: If nothing of that name was rewritten.
    """
    state = state_of(gated)
    host = next((p.site.host for p in state.plan.sites if p.site.name == name), name)
    programs = getattr(type(gated.get_submodule(host)), "_surgery_programs", None) if _has(gated, host) else None
    if programs is None:
        hosts = list(dict.fromkeys(p.site.host or "''" for p in state.plan.sites))
        raise UnknownSite(
            f"{name!r} is neither a site of this {type(gated).__name__} nor a module that was rewritten"
            f"{near(name, (*state.names, *hosts))}; sites: {shortened(state.names)}; rewritten modules: {shortened(hosts)}"
        )
    return "\n".join(programs.sources)


def check_convertible(model: nn.Module) -> None:
    """Refuse what is not a dense module.

    Raises:
        UnsupportedModel: If it is not a module, is wrapped for several devices or compiled, or holds no Python code that it
            was made from.
        AlreadyConverted: If it carries gates.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModel(f"expected a torch.nn.Module, got {type(model).__name__}")
    if type(model).__name__ in _SHARDED:
        raise UnsupportedModel(
            f"this model is wrapped for training on several devices; convert what is inside, `model.module`, and wrap the result "
            f"in {type(model).__name__} again"
        )
    compiled = next((name for name, part in model.named_modules() if type(part).__name__ == _COMPILED), None)
    if compiled is not None:
        raise UnsupportedModel(
            f"{compiled or 'this model'} was made by torch.compile; convert the module that it was made from (in it, "
            "`._orig_mod`), and compile the result"
        )
    how = _compiled_by(model)
    if how:
        raise UnsupportedModel(
            f"this {type(model).__name__} was made by {how} and holds no Python code that gates could be put in; convert the "
            "module that it was made from (and export the result: surgery.export)"
        )
    if "_surgery_state" in model.__dict__ or any(isinstance(m, Gate) for m in model.modules()):
        raise AlreadyConverted(
            f"this {type(model).__name__} already has gates; use surgery.set_budget(model, budget), "
            "or surgery.remove(model) for the dense model"
        )


def _compiled_by(model: nn.Module) -> str:
    """What turned the module into a program, or one in it into a program that refuses `eval()`; "" where nothing did."""
    if isinstance(model, torch.jit.ScriptModule):
        return "torch.jit"
    exported = any(isinstance(module, fx.GraphModule) and "train" in vars(module) for module in model.modules())
    return "torch.export" if exported else ""


def flop_costs(plan: Plan) -> CostModel:
    """The cost model in FLOPs of a plan; one multiply-add = 2."""
    from surgery.routers import make_router
    from surgery.skip_paths import make_skip_path

    sites: dict[str, SiteCost] = {}
    with torch.device("meta"):
        for planned in plan.sites:
            site = planned.site
            per_token = planned.granularity == "token"
            router = make_router(planned)
            asked = 0.0 if planned.always_on else float(router.flops(site.positions if per_token else 1))
            if site.heads is not None:
                share = SiteCost(float(site.heads.flops), 0.0, asked / site.heads.count)
                sites |= dict.fromkeys(site.units, share)
                continue
            skip = make_skip_path(planned)
            keeps_keys = per_token or (planned.granularity == "prefill" and is_in_first(1, site))
            saved = site.query.flops if site.query is not None and keeps_keys else site.flops
            sites[site.name] = SiteCost(float(saved), float(skip.flops(site.positions)), asked)
    return CostModel("flops", float(max(plan.model_flops, 1)), sites)


def empty_gates(plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """Every host's name and its gates on the meta device, hung as in the network: `.surgery_gates.<key>`."""
    state = GatedState(plan=plan, costs=CostModel("flops", 1.0, {}))
    with torch.device("meta"):
        for host in dict.fromkeys(p.site.host for p in plan.sites):
            holder, gates = nn.Module(), Gates(state)
            for planned in plan.sites:
                if planned.site.host == host:
                    gates.hang(planned, host)
            holder.add_module(GATES, gates)
            yield host, holder


def install(gated: nn.Module, host: str, planned: Iterable[SitePlan], plan: Plan, state: GatedState) -> None:
    """Turn one module of `gated` into a host."""
    module = gated.get_submodule(host)
    prefix = f"{host}." if host else ""
    gates = Gates(state)
    marked = []
    for one in planned:
        key = gates.hang(one, host, _owners(gated, one))
        gates._modules[key].cache_layer = _cache_layer(gated, one.site)  # type: ignore[union-attr]
        axes = {i.name: i for i in one.site.inputs}
        anchor = tuple(a[len(prefix) :] for a in one.site.anchor)
        attention = _attention(one).removeprefix(prefix)
        marked.append(Marked(one.site.name, key, anchor, axes, one.site.shared, one.leader, attention))
    base = base_class(module)
    inlined = frozenset(n[len(prefix) :] for n in plan.inlined if n.startswith(prefix))
    patterns = [Pattern.from_list(p) for p in plan.patterns[host]]
    traced = {name: type(one) for name, one in module.named_modules() if name in inlined}
    programs = Programs(host, base, signature_of(base), tuple(marked), inlined, patterns[0].holds, traced=traced)
    module.add_module(GATES, gates)
    module.__class__ = subclass(base, {"forward": _dispatcher(base), "_surgery_programs": programs})
    for pattern in patterns:
        programs.add(module, pattern, strict=pattern == patterns[0], trusted=True)


def _owners(gated: nn.Module, planned: SitePlan) -> Owners:
    """Modules and names of the parameters that a gate looks for while its attention runs."""
    if planned.site.heads is not None:
        return tuple(owner(gated, name) for name in planned.site.heads.names)
    roles = planned.site.query
    if roles is None or planned.granularity == "sample":
        return ()
    return tuple(owner(gated, name) if name else None for name in (roles.query, roles.output))


def _attention(planned: SitePlan) -> str:
    """Name of the module whose linear map makes queries, sample by sample, of attention that is decided per token; or ""."""
    roles = planned.site.query
    if roles is None or planned.granularity != "token" or not roles.query_rows == roles.output_rows == "NT":
        return ""
    return roles.query.rpartition(".")[0].rpartition(".")[0]


def _cache_layer(gated: nn.Module, site: Site) -> int | None:
    """Index of the site's attention in key/value caches, by the name that transformers gives it."""
    parts = [part for name in site.modules if _has(gated, name) for part in gated.get_submodule(name).modules()]
    found = [getattr(part, "layer_idx", None) for part in parts]
    return next((index for index in found if isinstance(index, int)), None)


def _make_root(gated: nn.Module, state: GatedState) -> None:
    cls = base_class(gated)
    existing = {
        k: v for k, v in vars(type(gated)).items() if k in ("forward", "_surgery_programs") or k.startswith("_branch_")
    }
    extra = existing if type(gated) is not cls else {}
    gated.__class__ = subclass(cls, {**extra, **roots.namespace(cls)})
    gated.__dict__["_surgery_state"] = state


def subclass(base: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """A class that looks like `base` from outside, with the functions of `namespace`."""
    cls = type(
        base.__name__,
        (base,),
        {
            "__reduce_ex__": _reduce,
            **namespace,
            "_surgery_base": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        },
    )
    cls.__qualname__ = base.__qualname__
    return cls


class _Unpicklable:
    """What `copy` calls to make an object, and what `pickle` cannot store, since generated classes have no importable name."""

    def __init__(self, make: Callable[..., Any], name: str) -> None:
        self.make, self.name = make, name

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CheckpointError(
            f"a gated {self.name} cannot be pickled, since the code in it was generated; write it with "
            "surgery.save(gated, directory) and read it with surgery.load, or torch.save its state_dict()"
        )


def _reduce(self: nn.Module, protocol: Any) -> Any:
    reduced: Any = base_class(self).__reduce_ex__(self, protocol)
    return (_Unpicklable(reduced[0], type(self).__name__), *reduced[1:])


def _dispatcher(base: type[nn.Module]) -> Callable[..., Any]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self)._surgery_programs.run(self, args, kwargs)

    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return forward


def _key(site: str, host: str, gates: nn.Module) -> str:
    relative = site[len(host) + 1 :] if host and site.startswith(f"{host}.") else "" if site == host else site
    stem = re.sub(r"[^a-zA-Z0-9_]", "_", relative) or "branch"  # it becomes part of generated code
    if not stem.isidentifier() or keyword.iskeyword(stem) or hasattr(gates, stem):
        stem = f"branch_{stem}"
    key, count = stem, 1
    while key in gates._modules:
        count += 1
        key = f"{stem}_{count}"
    return key


def _trainable(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _gates(gated: nn.Module) -> Collection[tuple[str, Gate]]:
    return [(name, m) for name, m in gated.named_modules() if isinstance(m, Gate)]


def _has(model: nn.Module, name: str) -> bool:
    return name == "" or name in dict(model.named_modules())
