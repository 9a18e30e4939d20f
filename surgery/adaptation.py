"""`heal`: a small adaptation of the backbone to its gates, by distillation from the dense model. Opt-in.

Everything else leaves the backbone as it is and trains what replaces skipped work. Healing also lets what runs make up for what
does not: scales and shifts of norms, or low-rank changes of linear maps (Hu et al. 2021, LoRA), of which the model keeps
copies of its own (`surgery.healing`), so that the dense model stays within it bit for bit.

Axis letters: `N` samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.budgets import budget_range, set_budget
from surgery.calling import call, read_output
from surgery.context import draw_unit, execution, state_of
from surgery.costs import observe, place, run
from surgery.errors import BudgetError, MissingDependency, SurgeryError, check_choice
from surgery.gates import Gate
from surgery.healing import DOWN, UP, install, uninstall
from surgery.held_out import HeldOut
from surgery.objectives import distances, divergence
from surgery.options import Options
from surgery.progress import Progress, silent
from surgery.rates import clip, one_cycle
from surgery.rewriting import remove
from surgery.state import Healing
from surgery.tracing import GATES
from surgery.training import count_steps, stream_of

logger = logging.getLogger(__name__)
KINDS = ("norms", "lora")
LOWEST, HIGHEST = 0.45, 0.9
"""Budgets that are healed for beside the model's own."""
_CLIP = 1.0


@torch.inference_mode(False)
def heal(
    gated: nn.Module,
    data: Iterable[Any],
    kind: Literal["norms", "lora"],
    *,
    options: Options | None = None,
    seed: int = 0,
    validation: Iterable[Any] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Adapt the backbone to the gates as they are calibrated; gates, skip paths and backbone tensors stay as they are.

    Every other step runs at the model's budget, the others at one drawn from the range that a checkpoint serves. Calibrate
    again afterwards: healed streams give routers other inputs.

    Args:
        gated: A calibrated gated model whose budget is set below 1.
        data: Re-iterable batches; labels are not used.
        kind: `norms`: scales and shifts of normalisation layers. `lora`: low-rank changes of the linear maps in branches,
            trained by peft (extra `heal`).
        options: `epochs`, `steps`, `heal_rate`, `heal_rank` and `temperature` are used.
        seed: Seed of the budgets drawn and of low-rank factors.
        validation: Held-out batches; where healing takes the output farther from the dense model there, it is undone.
        progress: Called after every step.

    Returns:
        The loss of every step.

    Raises:
        BudgetError: If no budget below 1 is set.
        SurgeryError: If the model has no norms with scales, or no linear maps in branches.
        MissingDependency: If `lora` is asked for and peft is not installed.
        DataError: If the data yields nothing, or its length is unknown and `options.steps` is not given.
    """
    check_healable(gated, kind)
    options, state, report = options or Options(), state_of(gated), progress or silent
    budget = state.budget
    if budget is None or budget >= 1 or not state.table:
        raise BudgetError("there is nothing to heal from while everything runs; calibrate for a budget below 1 first")
    looks, state.looks = state.looks, []  # what a second look replaces is the dense model's, healed or not
    set_budget(gated, budget)
    uninstall(gated)
    teacher = remove(gated).eval()
    apart = _Apart(gated, validation, budget)
    before = apart.distance()
    total = count_steps(data, options)
    trains = _norms(gated) if kind == "norms" else _low_rank(gated, options.heal_rank, seed)
    try:
        with trains as parameters:
            losses = _train(gated, teacher, data, parameters, budget, total, options, seed, report)
        set_budget(gated, budget)  # the last step may have had another one
        after = apart.distance()
    finally:
        state.looks = looks
        set_budget(gated, budget)
    if before is not None and after is not None and not after < before:
        uninstall(gated)
        state_of(gated).note(
            f"healing ({kind}) did not improve on held-out data ({before:.4g} -> {after:.4g}) and was undone"
        )
    else:
        gain = "" if before is None else f": mean divergence on held-out data {before:.4g} -> {after:.4g}"
        state_of(gated).note(f"healed ({kind}){gain}")
    return losses


def check_healable(gated: nn.Module, kind: Literal["norms", "lora"]) -> None:
    """Refuse what `heal` would refuse, as soon as gates are there.

    Raises:
        SurgeryError: If the kind is unknown, or the model has no norms with scales, or no linear maps in branches.
        MissingDependency: If `lora` is asked for and peft is not installed.
    """
    check_choice("kind", kind, KINDS)
    scales, linears = _scales(gated), _linears(gated)
    if kind == "norms" and not scales:
        other = "; take heal='lora'" if linears else ""
        raise SurgeryError(f"{type(gated).__name__} has no norm with a scale or shift to heal{other}")
    if kind == "norms":
        return
    if not linears:
        other = "; take heal='norms'" if scales else ""
        raise SurgeryError(f"{type(gated).__name__} has no linear map inside a branch to heal{other}")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependency('healing by LoRA needs peft: pip install "bypass-surgery[heal]"') from error


def _train(
    gated: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    parameters: Sequence[nn.Parameter],
    budget: float,
    total: int,
    options: Options,
    seed: int,
    report: Progress,
) -> list[float]:
    low, high = budget_range(gated)
    low, high = max(low, min(LOWEST, budget)), min(high, max(HIGHEST, budget))
    optimiser, schedule = one_cycle(parameters, total, rate=options.heal_rate)
    stream = stream_of(data)
    losses = []
    for step in range(total):
        set_budget(gated, budget if step % 2 == 0 else low + (high - low) * draw_unit(seed, step))
        batch = place(next(stream), gated)
        with torch.no_grad():
            wanted = read_output(call(teacher, batch))
        with torch.enable_grad(), execution(gated, "static" if state_of(gated).policy == "static" else "mask"):
            output, values = read_output(run(gated, batch)), state_of(gated).gives_values
            loss = divergence(output, wanted, batch, options.temperature, values=values).mean()
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        clip(parameters, _CLIP)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        report("healing", step + 1, total)
    return losses


@contextmanager
def _norms(gated: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Changes of all scales and shifts, in force and trainable inside the block."""
    parameters = list(install(gated, Healing("norms", _scales(gated))).values())
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield parameters
    except BaseException:
        uninstall(gated)
        raise
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _low_rank(gated: nn.Module, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """peft's adapters on the linear maps of branches, trainable inside the block; afterwards they are changes of ours.

    peft wraps modules, and so renames what the state dict, the plan and the fingerprint go by; it stays for the training.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _linears(gated)
    needs = {name: p.requires_grad for name, p in gated.named_parameters()}
    originals = {name: gated.get_submodule(name) for name in names}
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), gated)
        wrapped: dict[str, Any] = {name: gated.get_submodule(name) for name in names}
        factors = {n: (w.lora_A["default"].weight, w.lora_B["default"].weight) for n, w in wrapped.items()}
        gated.eval()
        yield [factor for pair in factors.values() for factor in pair]
    finally:
        for name, module in originals.items():
            parent, _, key = name.rpartition(".")
            setattr(gated.get_submodule(parent), key, module)
        for name, parameter in gated.named_parameters():
            parameter.requires_grad_(needs[name])
    shapes = {f"{name}.weight": tuple(module.get_parameter("weight").shape) for name, module in originals.items()}
    added = install(gated, Healing("lora", shapes, rank))
    with torch.no_grad():
        for name, (down, up) in factors.items():
            added[f"{name}.{GATES}.weight{DOWN}"].copy_(down)
            added[f"{name}.{GATES}.weight{UP}"].copy_(up)


def _scales(gated: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales and shifts of norms."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in gated.named_modules():
        if _is_norm(module) and GATES not in name.split("."):
            own = {key: value for key, value in module._parameters.items() if value is not None and value.dim() == 1}
            shapes |= {f"{name}.{key}" if name else key: tuple(value.shape) for key, value in own.items()}
    return shapes


def _linears(gated: nn.Module) -> list[str]:
    """Names of the linear maps in branches. Inside torch's own attention weights are read past the module, so that an adapter
    would not see them.
    """
    inside = {name for planned in state_of(gated).plan.sites for name in planned.site.modules}
    found = []
    for name, module in gated.named_modules():
        parents = {name[:end] for end in range(len(name) + 1) if end == len(name) or name[end] == "."}
        fused = isinstance(gated.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        if isinstance(module, nn.Linear) and parents & inside and GATES not in name.split(".") and not fused:
            found.append(name)
    return found


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not isinstance(module, Gate)


class _Apart:
    """How far a model is from the dense one on held-out data, whenever it is asked, at the cost of the same budget."""

    def __init__(self, gated: nn.Module, data: Iterable[Any] | None, budget: float) -> None:
        self.gated, self.data = gated, data
        self.held = HeldOut(gated, data, [budget])
        self.dense: list[Tensor] = []

    def distance(self) -> float | None:
        """Mean divergence; None without data."""
        if self.data is None:
            return None
        state = state_of(self.gated)
        if state.policy == "routed":  # routers see other streams afterwards, so the threshold is found anew
            return self.held.look({})["held_divergence"]
        if not self.dense:
            with execution(self.gated, "dense"):
                self.dense = observe(self.gated, self.data).outputs
        found = observe(self.gated, self.data).outputs
        return float(distances(found, self.dense, self.data, values=state.gives_values).mean())
