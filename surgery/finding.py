"""`find_sites`: what can be skipped in a model, proved by running it.

Every module's own `forward` is traced bottom-up. An add whose residual is open (BERT's `dense(hidden) + input`) makes
its module be traced through from the parent. Then a trial conversion runs with all gates open: it must be bit-equal,
and every branch is probed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery import probing
from surgery.calling import REFUSALS, Batch, as_batch, call, evaluating, is_causal, refusal, tensors
from surgery.context import handled
from surgery.copying import share
from surgery.counting import flop_counter
from surgery.errors import SurgeryError, TraceError, UnsupportedModel, first_line
from surgery.first_calls import plain_attention
from surgery.patterns import KINDS, Pattern, patterns_of_call, signature_of
from surgery.probing import Claim, Probe
from surgery.regions import Findings, Region, find_regions
from surgery.rewriting import check_convertible, insert_gates
from surgery.sites import CHANNELS_FIRST, Granularity, Plan, Rejection, Site, SitePlan, Sites
from surgery.tracing import CACHE_NAMES, trace

logger = logging.getLogger(__name__)

_OTHER = "a sum whose terms come from different places, none of which is the residual of the others"
_STATE = 2**16  # numbers in a buffer


@dataclass(slots=True)
class Host:
    """One module whose forward will be generated."""

    name: str
    patterns: list[Pattern]
    graph: fx.Graph
    regions: list[Region]
    inlined: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What the names of its descendants begin with."""
        return f"{self.name}." if self.name else ""


@torch.inference_mode(False)
def find_sites(model: nn.Module, example: Any) -> Sites:
    """Find what can be skipped.

    Args:
        model: Any module; it runs a few times under `no_grad` in eval mode and is left as it was.
        example: What the model is called with: a tensor, a tuple, or a dict of keyword arguments. Two or more samples
            with some padding say most; one sample is doubled.

    Returns:
        The sites in order of execution, and what was rejected with its reason; prints as a table.

    Raises:
        UnsupportedModel: If it is not a module, is on the meta device, or gives no tensor.
        AlreadyConverted: If it carries gates.
        DataError: If the example holds no tensor, or the model refuses it.
    """
    check_convertible(model)
    check_weights(model)
    batch = _pair(as_batch(example))
    with evaluating(model), _same_buffers(model), plain_attention():
        try:
            with flop_counter() as counter:
                twin = share(model)  # frozen: the FLOP counter fails on leaf tensors that require gradients
                patterns, output = patterns_of_call(twin, lambda: _run(twin, batch))
        except (SurgeryError, torch.OutOfMemoryError):
            raise
        except REFUSALS as error:
            raise refusal(model, batch, error) from error
        reference = _reference(model, output)
        hosts, rejections = _trace_all(model, patterns)
        hosts, nested, within = _without_nested(model, hosts)
        rejections += nested
        sites, heads, failed, inlined = _probe(model, batch, hosts, reference)
    rejections += failed
    covered = {module for site in sites for module in site.modules}
    kept = {host.name: [p.to_list() for p in host.patterns] for host in hosts}
    used = {site.host for site in sites}
    flops = counter.get_total_flops() // batch.size
    return Sites(
        [replace(site, share=site.flops / max(flops, 1)) for site in sites],
        [*_relevant(rejections, covered), *(r for name, r in within if name in covered)],
        heads=[replace(site, share=site.flops / max(flops, 1)) for site in heads if isinstance(site, Site)],
        heads_rejections=[site for site in heads if isinstance(site, Rejection)],
        model_name=type(model).__name__,
        model_flops=flops,
        model_parameters=sum(p.numel() for p in model.parameters()),
        signature=_signature(batch),
        patterns={name: value for name, value in kept.items() if name in used},
        inlined=[name for name in inlined if any(host == "" or name.startswith(f"{host}.") for host in used)],
        causal=is_causal(model),
    )


def check_weights(model: nn.Module) -> None:
    """Refuse a model without real weights, or with such as no gradient can pass.

    Raises:
        UnsupportedModel: If a parameter or buffer is on the meta device, or was made in `torch.inference_mode()`.
    """
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        raise UnsupportedModel(
            f"{type(model).__name__} was made inside torch.inference_mode(), and no gradient passes such weights; make, load "
            "or copy.deepcopy it outside of that block"
        )
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        raise UnsupportedModel(
            f"{type(model).__name__} is on the meta device; finding sites runs it, so it needs real weights: load them first "
            "(inserting gates from a saved plan works on the meta device)"
        )


def _reference(model: nn.Module, output: Any) -> list[Tensor]:
    """What the gated model must give bit for bit.

    Raises:
        UnsupportedModel: If nothing in the output could be compared.
    """
    found = tensors(output)
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} returns a {type(output).__name__} in which no tensor was found, so that gates cannot be "
            "checked against it; return a tensor, or tensors in a tuple, a dict or a dataclass"
        )
    return found


def _trace_all(model: nn.Module, patterns: Mapping[str, list[Pattern]]) -> tuple[list[Host], list[Rejection]]:
    """Trace bottom-up; modules with open residuals are traced through from their parents."""
    rejections: list[Rejection] = []
    hosts: dict[str, Host] = {}
    open_modules: dict[str, tuple[str, ...]] = {}  # name -> itself and what is inlined in it
    names = [name for name, _ in model.named_modules()]
    for name in sorted(names, key=lambda n: -n.count(".") - (n != "")):
        if name not in patterns:
            continue
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        inside = [n for n in open_modules if n.startswith(prefix)]
        inlined = tuple(dict.fromkeys(one for n in inside for one in open_modules[n]))
        result = _trace_one(module, patterns[name], tuple(n[len(prefix) :] for n in inlined))
        if isinstance(result, str) and inlined:
            rejections += [Rejection(n, f"{_OTHER} ({result})") for n in inside]
            for n in inside:
                del open_modules[n]
            inside, inlined = [], ()
            result = _trace_one(module, patterns[name], ())
        if isinstance(result, str):
            if any(p.dim() > 1 for p in module.parameters()) and list(module.children()):
                rejections.append(Rejection(name or "model", result))
            continue
        used, graph, findings = result
        rejections += [Rejection(prefix + where, why) for where, why in findings.rejected]
        if findings.regions:
            hosts[name] = Host(name, used, graph, findings.regions, inlined)
            for n in inside:
                del open_modules[n]
        if findings.open and not findings.regions and name:
            for n in inside:
                del open_modules[n]
            open_modules[name] = (name, *inlined)
        elif findings.open:
            rejections.append(Rejection(name or "model", _OTHER))
    rejections += [Rejection(name, _OTHER) for name in open_modules]
    return list(hosts.values()), rejections


def _trace_one(
    module: nn.Module, patterns: list[Pattern], inlined: tuple[str, ...]
) -> tuple[list[Pattern], fx.Graph, Findings] | str:
    """Trace with dtypes, numbers and sizes as values, else with dtypes held fixed, else with numbers, else with sizes as
    well; the reason if none of these works.
    """
    reason = "it is never called"
    for held in KINDS:
        if held == "sizes" and _reads_cache(module, patterns):
            continue  # while it generates, every call has another length
        group = [p for p in patterns if p.holds == held]
        try:
            graph = trace(module, group[0], inlined)
        except TraceError as error:
            reason = str(error)
        except IndexError:
            continue
        else:
            return group, graph, find_regions(graph, module)
    return reason


def _reads_cache(module: nn.Module, patterns: list[Pattern]) -> bool:
    names = {p.name for p in signature_of(type(module)).named} | {n for p in patterns for n, _ in p.keywords}
    return bool(names & CACHE_NAMES)


def _without_nested(
    model: nn.Module, hosts: list[Host]
) -> tuple[list[Host], list[Rejection], list[tuple[str, Rejection]]]:
    """Of a branch and the sites inside it, keep the finer ones if they hold half of its parameters, else the branch.

    Returns:
        The hosts left, the branches left out, and the finer hosts left out with a module of the branch around them.
    """
    weights = {
        host.name: _weight(model, [host.prefix + c for region in host.regions for c in region.calls]) for host in hosts
    }
    dropped: set[str] = set()
    rejections, within = [], []
    for host in sorted(hosts, key=lambda h: h.name.count(".") + (h.name != "")):  # outermost first
        if host.name in dropped:
            continue
        regions = []
        for region in host.regions:
            calls = [host.prefix + c for c in region.calls]
            inner = [n for n in weights if n not in dropped and any(n == c or n.startswith(f"{c}.") for c in calls)]
            if inner and 2 * sum(weights[n] for n in inner) >= _weight(model, calls):
                rejections.append(
                    Rejection(calls[0], f"it contains other sites (in {len(inner)} modules), which are kept")
                )
            else:
                regions.append(region)
                dropped |= set(inner)
                reason = "its branch lies inside a larger one, which holds most of the parameters and is kept"
                within += [(calls[0], Rejection(n, reason)) for n in inner]
        host.regions = regions
    return [host for host in hosts if host.regions and host.name not in dropped], rejections, within


def _weight(model: nn.Module, names: list[str]) -> int:
    """Number of different parameters in the modules, and among the tensors, that are named."""
    found: dict[int, int] = {}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        holder = model.get_submodule(owner)
        if leaf in holder._modules or not name:
            found |= {id(p): p.numel() for p in model.get_submodule(name).parameters()}
        elif (parameter := holder._parameters.get(leaf)) is not None:
            found[id(parameter)] = parameter.numel()
    return sum(found.values())


def _probe(
    model: nn.Module, batch: Batch, hosts: list[Host], reference: list[Tensor]
) -> tuple[list[Site], list[Site | Rejection], list[Rejection], list[str]]:
    rejections: list[Rejection] = []
    larger = batch.rows(torch.tensor([*range(batch.size), 0], device=batch.device))
    while hosts:
        try:
            trial = _try(model, batch, larger, hosts)
            equal = _equal(trial.output, reference)
        except Exception as error:  # anything may go wrong in a model that was traced wrongly; it is then narrowed down
            logger.debug("trial conversion failed", exc_info=True)
            if refused := _refuses(model, larger):
                return [], [], [Rejection(host.name or "model", refused) for host in hosts], []
            hosts, found = _narrow(model, batch, larger, hosts, reference, f"{type(error).__name__}: {error}")
            rejections += found
            continue
        if not equal:
            hosts, found = _narrow(model, batch, larger, hosts, reference, "")
            rejections += found
            continue
        probe = trial.probe
        once = is_causal(model) and any(claim.cached for claim in probe.claims.values())
        sites, failed = _judge(trial.named, probe, once)
        heads = [one for site in sites if (one := _heads(site, probe.claims[site.name], once)) is not None]
        return sites, heads, rejections + failed, trial.inlined
    return [], [], rejections, []


@dataclass(slots=True)
class _Trial:
    """A trial conversion that ran, with every branch in full."""

    named: list[tuple[Host, Region, Site]]
    inlined: list[str]
    probe: Probe
    output: list[Tensor]


def _try(model: nn.Module, batch: Batch, larger: Batch, hosts: list[Host]) -> _Trial:
    """Convert `hosts` for a trial and run what was generated, with two batch sizes."""
    named = _name(model, hosts)
    inlined = list(dict.fromkeys(n for host in hosts for n in host.inlined))
    plan = Plan(
        tuple(SitePlan(site, "sample", "identity", hidden=1) for _, _, site in named),
        type(model).__name__,
        1,
        patterns={host.name: [p.to_list() for p in host.patterns] for host in hosts},
        inlined=tuple(inlined),
    )
    modules = {site.name: [model.get_submodule(m) for m in site.modules] for _, _, site in named}
    input_names = {site.name: tuple(n.name for n in region.inputs) for _, region, site in named}
    gated = insert_gates(model, plan)
    parameters = {site.name: _parameters(gated, site) for _, _, site in named}
    first = Probe(input_names, modules, parameters, larger.size)
    with handled(gated, first):
        _run(gated, larger)
    second = Probe(input_names, modules, parameters, batch.size, first.claims)
    with handled(gated, second):
        output = tensors(_run(gated, batch))
    return _Trial(named, inlined, second, output)


def _refuses(model: nn.Module, larger: Batch) -> str:
    """Why the model itself does not take one sample more; "" where it does."""
    try:
        _run(share(model), larger)
    except REFUSALS as error:
        return (
            "the model refuses this example with its first sample repeated "
            f"({first_line(error, type(error).__name__)[:100]}): samples have to lie along the first axis of the tensors; of a "
            "model that takes a list of them, convert the part that is called with a batch"
        )
    return ""


def _run(model: nn.Module, batch: Batch) -> Any:
    """A call that draws the same random numbers as every other one: some models do in eval mode (ViLT, ViT-MAE)."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        torch.manual_seed(0)
        return call(model, batch)


def _narrow(
    model: nn.Module, batch: Batch, larger: Batch, hosts: list[Host], reference: list[Tensor], reason: str
) -> tuple[list[Host], list[Rejection]]:
    """Try every host alone; keep those that are bit-equal."""
    kept, rejections = [], []
    for host in hosts:
        why = ""
        try:
            if not _equal(_try(model, batch, larger, [host]).output, reference):
                why = "its traced forward does not give the same result"
        except Exception as error:  # the reason goes into the table
            why = (
                f"its traced forward fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
        if why:
            rejections.append(Rejection(host.name or "model", why))
        else:
            kept.append(host)
    if len(kept) == len(hosts):
        rejections = [
            Rejection(h.name or "model", f"gates do not work together here ({reason or 'results differ'})")
            for h in hosts
        ]
        kept = []
    return kept, rejections


def _judge(named: list[tuple[Host, Region, Site]], probe: Probe, once: bool) -> tuple[list[Site], list[Rejection]]:
    sites, rejections = [], []
    order = {name: index for index, name in enumerate(probe.claims)}
    for _, _, site in sorted(named, key=lambda entry: order.get(entry[2].name, len(order))):
        claim = probe.claims.get(site.name)
        reason = "it did not run with this example" if claim is None else claim.problem
        if claim is not None and not reason and claim.per_sample and claim.per_token:
            reason = claim.per_sample
        if claim is None or reason:
            rejections.append(Rejection(site.name, reason))
        else:
            sites.append(_site(site, claim, probe, once))
    return sites, rejections


def _site(trial: Site, claim: Claim, probe: Probe, once: bool) -> Site:
    granularities: list[Granularity] = [] if claim.per_sample else ["sample"]
    if not claim.per_token:
        granularities.append("token")
    if (
        once
        and claim.layout == "NTC"
        and not (claim.folded or claim.sequence_first)
        and not (claim.per_prompt if claim.cached else claim.per_sample)
    ):
        granularities.append("prefill")
    shape = claim.residual[:2][::-1] + claim.residual[2:] if claim.sequence_first else claim.residual
    channels = shape[1] if claim.layout in ("NC", *CHANNELS_FIRST) else shape[-1]
    positions = int(torch.Size(shape[1:]).numel()) // channels
    axes = probe.axes[trial.name]
    assert not isinstance(axes, str)
    named = list(zip(trial.modules, probe.modules[trial.name], strict=True))
    heaviest = sorted(named, key=lambda pair: -sum(p.numel() for p in pair[1].parameters()))
    return replace(
        trial,
        kind=probing.kind_of_site(claim.operations, heaviest, not claim.per_token and claim.query is None),
        flops=claim.flops // claim.samples,
        granularities=tuple(granularities),
        layout=claim.layout,
        channels=channels,
        positions=positions,
        inputs=axes,
        query=claim.query,
        shared=claim.shared,
        folded=claim.folded,
        sequence_first=claim.sequence_first,
        chain=claim.chain,
    )


def _heads(branch: Site, claim: Claim, once: bool) -> Site | Rejection | None:
    """The site of kind `heads` in a branch, or why there is none; None where nobody would look for heads."""
    name = f"{branch.name}.heads"
    if branch.shared or branch.folded:
        return Rejection(
            name, "samples and tokens share an axis, or the branch gives more than one output that is read"
        )
    if isinstance(claim.heads, str):
        return Rejection(name, claim.heads) if claim.heads and branch.kind == "attention" else None
    flops = claim.heads.count * claim.heads.flops
    granularities: tuple[Granularity, ...] = ("sample", "prefill") if once else ("sample",)
    return replace(
        branch, name=name, kind="heads", flops=flops, granularities=granularities, query=None, heads=claim.heads
    )


def _parameters(model: nn.Module, site: Site) -> dict[str, Tensor]:
    """The parameters of a site's modules, by their names in the model."""
    return {f"{m}.{name}": p for m in site.modules for name, p in model.get_submodule(m).named_parameters()}


def _name(model: nn.Module, hosts: list[Host]) -> list[tuple[Host, Region, Site]]:
    """Name every region: the common prefix of its calls if no other site is named so or lies below, else its costliest
    call.
    """
    entries = [(host, region) for host in hosts for region in host.regions]
    prefixes = [_common(host, region) for host, region in entries]
    heaviest = [_heaviest(model, host, region) for host, region in entries]
    used: Counter[str] = Counter()
    named = []
    for index, (host, region) in enumerate(entries):
        prefix = prefixes[index]
        others = [p for i, p in enumerate(prefixes) if i != index]
        clash = not prefix or any(p == prefix or p.startswith(f"{prefix}.") for p in others)
        name = heaviest[index] if clash else prefix
        used[name or host.name] += 1
        if not name or used[name] > 1:
            name = f"{name or host.name or 'model'}#{used[name or host.name]}"
        calls = tuple(dict.fromkeys(host.prefix + c for c in region.calls))
        anchor = tuple(host.prefix + a for a in region.anchor)
        site = Site(
            name, "block", host.name, 0, 0.0, _weight(model, list(anchor)), ("sample",), "other", 1, 1,
            modules=calls, anchor=anchor,
        )  # fmt: skip
        named.append((host, region, site))
    return named


def _common(host: Host, region: Region) -> str:
    parts = [(host.prefix + c).split(".") for c in region.calls]
    if not parts:
        return ""
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _heaviest(model: nn.Module, host: Host, region: Region) -> str:
    calls = [host.prefix + c for c in region.calls]
    if not calls:
        return ""
    return max(calls, key=lambda c: (sum(p.numel() for p in model.get_submodule(c).parameters()), -calls.index(c)))


def _relevant(rejections: list[Rejection], covered: set[str]) -> list[Rejection]:
    """Leave out what lies inside a site or inside another rejected place, and modules around them that cannot be
    traced.
    """
    named = {r.where for r in rejections if "cannot be traced" not in r.reason}
    kept = []
    for rejection in dict.fromkeys(rejections):
        where, untraced = rejection.where, "cannot be traced" in rejection.reason
        inside = any(where == m or where.startswith(f"{m}.") for m in covered)
        doubled = untraced and any(where == n or where.startswith(f"{n}.") for n in named)
        below = "" if where == "model" else f"{where}."
        around = untraced and any(m.startswith(below) for m in (*covered, *named))
        if not (inside or doubled or around):
            kept.append(rejection)
    return kept


def _pair(batch: Batch) -> Batch:
    """A batch of at least two different samples."""
    if batch.size > 1:
        return batch
    pair = batch.rows(torch.zeros(2, dtype=torch.long, device=batch.device))
    generator = torch.Generator().manual_seed(0)

    def vary(value: Tensor) -> Tensor:
        if value.dim() == 0 or len(value) != 2 or not torch.isfinite(value).all():  # minus infinity: a mask
            return value
        value = value.clone()
        if value.is_floating_point():
            noise = torch.randn(value[1].shape, generator=generator).to(value)
            value[1] += 0.1 * value[1].std(correction=0) * noise
        elif value.dim() > 1 and not set(value.unique().tolist()) <= {0, 1}:
            value[1] = value[1].roll(1, 0)
        return value

    return replace(pair.mapped(vary), labels=None)


def _equal(output: list[Tensor], reference: list[Tensor]) -> bool:
    return len(output) == len(reference) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(output, reference, strict=True)
    )


def _signature(batch: Batch) -> dict[str, Any]:
    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        return None if value is None else type(value).__name__

    return {"args": [describe(v) for v in batch.args], "kwargs": {k: describe(v) for k, v in batch.kwargs.items()}}


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """What the buffers hold is back afterwards, on every path."""
    held = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if _is_state(buffer)]
    try:
        yield
    finally:
        for buffer, version, value in held:
            if buffer._version != version:
                buffer.copy_(value)


def _is_state(buffer: Tensor) -> bool:
    """Whether a `forward` may count or average in it; larger ones are tables and masks, or quantized weights."""
    return type(buffer) is Tensor and not buffer.is_inference() and buffer.numel() <= _STATE
