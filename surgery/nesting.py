"""`train_skip_paths`: one set of skip paths for all static policies, by distillation from the dense model.

Static policies of all budgets are nested: each cuts the first sites of one order (`surgery.cutting`). Every sample of a
step gets a number of cuts of its own, so that each skip path learns from the streams that it will see at every budget.
The rows of a batch are sorted by it; the rows that skip a site are then the first ones, and no branch runs for them.

Axis letters: `N` samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.branches import Branch, take_samples
from surgery.calling import Batch, batches, read_output
from surgery.context import execution, force, handled, state_of
from surgery.costs import place, run
from surgery.errors import CheckpointError, SurgeryError, check_budget
from surgery.gates import Gate, iter_gates
from surgery.objectives import Scale, apart, divergence
from surgery.options import Options
from surgery.policies import static_cost
from surgery.progress import Progress, silent
from surgery.rates import clip, one_cycle, parameter_groups
from surgery.resuming import check_options, undamaged, write_checkpoint
from surgery.straight_through import OpenGates, stream_error, watched_sites
from surgery.training import count_steps, stream_of

CHECKPOINT = "skip_paths.pt"
LOWEST, HIGHEST = 0.45, 0.95
"""Costs of the static policies that are trained for."""
_STREAM = 5.0
_CLIP = 5.0
_LOOKS = (0.25, 0.75)  # which of the trained policies are looked at before and after


@torch.inference_mode(False)
def train_skip_paths(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    budget: float | None = None,
    options: Options | None = None,
    seed: int = 0,
    validation: Iterable[Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[float]:
    """Train skip paths for all static policies at once; no router and no backbone tensor changes.

    Several processes each compute the same steps.

    Args:
        gated: A gated model with fitted skip paths and a cut order.
        data: Re-iterable batches; labels are not used.
        budget: The one that matters most; cuts that cost from 0.45, or from it or the smallest of `options.budgets` where that is
            smaller, to 0.95 of the dense model are trained for.
        options: `epochs`, `steps`, `nested_rate`, `temperature` and the smaller of `budgets` are used.
        seed: Seed of the cuts drawn.
        validation: Held-out batches; where training made static policies worse there, it is undone.
        output_dir: Where to keep a checkpoint to resume from; written atomically, also on Ctrl-C.
        resume: Continue from the checkpoint in `output_dir` if there is one.
        progress: Called after every step.

    Returns:
        The loss of every step; empty where there is nothing to train.

    Raises:
        DataError: If the data yields nothing, or its length is unknown and `options.steps` is not given.
        SurgeryError: If no cut order was measured.
        BudgetError: If the budget is outside (0, 1].
        CheckpointError: If the checkpoint is damaged, or of another model, plan or length, or of other options.
    """
    options, state, report = options or Options(), state_of(gated), progress or silent
    if not state.order:
        raise SurgeryError("static policies have no order yet; measure it first: surgery.cut_order(gated, data)")
    groups = parameter_groups([gate for _, gate in iter_gates(gated)], "skip_path", options.nested_rate, by_width=False)
    parameters = [p for group in groups for p in group["params"]]
    smallest = options.budgets[0] if options.budgets else LOWEST
    lowest = min(LOWEST, smallest, 1.0 if budget is None else check_budget(budget))
    levels = trained_levels(gated, lowest)
    if not parameters or not levels or options.nested_rate == 0:
        return []
    before = [p.detach().clone() for p in parameters]
    distance = _distance(gated, validation, levels)
    total = count_steps(data, options)
    optimiser, schedule = one_cycle(groups, total)
    layouts = {planned.site.name: planned.site.layout for planned in state.plan.sites}
    watched = watched_sites(state.names)
    losses: list[float] = []
    kept = _Kept(None if output_dir is None else Path(output_dir) / CHECKPOINT, parameters, optimiser, schedule)
    same_options = ("nested_rate", "temperature", "accumulate")
    settings = {"seed": seed, "lowest": lowest, **{name: getattr(options, name) for name in same_options}}
    if resume:
        losses, before, distance = kept.load(total, before, distance, settings)
    same = {"total": total, "before": before, "distance": distance, "options": settings}
    kept.keep(losses, same)
    stream = stream_of(data, skip=len(losses) * options.accumulate)
    gated.train()
    try:
        with torch.enable_grad():
            for step in range(len(losses), total):
                loss = torch.zeros(())
                for index in range(options.accumulate):
                    batch = next(stream)
                    generator = torch.Generator().manual_seed(((seed * 1_000_003 + step) * 64 + index) % 2**63)
                    mixed = torch.randperm(batch.size, generator=generator)  # the first rows get the deepest cuts
                    batch = place(batch.rows(mixed.to(batch.device)), gated)
                    cuts = torch.tensor(levels)[torch.randint(len(levels), (batch.size,), generator=generator)]
                    part = _loss(gated, batch, cuts, watched, layouts, options.temperature) / options.accumulate
                    if part.requires_grad:  # a branch that is cut need not run in every batch
                        part.backward()
                    loss = loss + part.detach().cpu()
                clip(parameters, _CLIP)
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
                losses.append(float(loss))
                kept.keep(losses, same)
                report("training skip paths", step + 1, total)
                if (step + 1) % options.save_every == 0:
                    kept.save()
    except KeyboardInterrupt:
        kept.save()
        raise
    finally:
        optimiser.zero_grad()
        gated.eval()
    kept.save()
    if not _distance(gated, validation, levels) <= distance:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
    return losses


@dataclass(slots=True)
class _Kept:
    """What is written to continue a training."""

    path: Path | None
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    schedule: Any
    content: dict[str, Any] = field(default_factory=dict)

    def keep(self, losses: Sequence[float], same: Mapping[str, Any]) -> None:
        """Remember the step that just ended, and what is the same for all: Ctrl-C may come in the middle of the next one."""
        if self.path is None:
            return
        self.content = {
            **same,
            "losses": list(losses),
            "parameters": [p.detach().clone() for p in self.parameters],
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))},
        }

    def save(self) -> None:
        """Write what was kept."""
        if self.path is not None and self.content:
            write_checkpoint(self.path, self.content)

    def load(
        self, total: int, before: list[Tensor], distance: float, options: Mapping[str, Any]
    ) -> tuple[list[float], list[Tensor], float]:
        """Continue from the checkpoint, if there is one: losses so far, and values and distance before training."""
        if self.path is None or not self.path.exists():
            return [], before, distance
        with undamaged(self.path):
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            shapes = [tuple(value.shape) for value in saved["parameters"]]
        if shapes != [tuple(p.shape) for p in self.parameters] or saved["total"] != total:
            raise CheckpointError(
                f"{self.path} is of another model or plan, or of a training over {saved['total']} steps (this one has "
                f"{total}); resume with the same model, data and options"
            )
        check_options(self.path, saved.get("options", {}), options)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, saved["parameters"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.load_state_dict(saved["schedule"])
        device = self.parameters[0].device
        return saved["losses"], [value.to(device) for value in saved["before"]], saved["distance"]


def interrupted_at(output_dir: str | Path | None) -> bool:
    """Whether a training of skip paths left a checkpoint there."""
    return output_dir is not None and (Path(output_dir) / CHECKPOINT).exists()


def trained_levels(gated: nn.Module, lowest: float = LOWEST) -> list[int]:
    """Numbers of cuts whose cost lies in the trained range, from `lowest` on; the nearest one where none does."""
    state = state_of(gated)
    order = state.order
    costs = [static_cost(state.costs, order[count:]) for count in range(len(order) + 1)]
    found = [count for count, cost in enumerate(costs) if count and lowest - 0.03 <= cost <= HIGHEST]
    return found or ([len(order)] if order else [])


def _loss(
    gated: nn.Module,
    batch: Batch,
    cuts: Tensor,
    watched: frozenset[str],
    layouts: Mapping[str, Any],
    temperature: float,
) -> Tensor:
    order = state_of(gated).order
    cuts = cuts.sort(descending=True).values
    skipped = {name: int((cuts > place).sum()) for place, name in enumerate(order)}
    teacher, student = _Watched(watched, {}), NestedGates(skipped, watched)
    with torch.no_grad(), handled(gated, teacher):
        dense = read_output(run(gated, batch))
    with handled(gated, student):
        output = read_output(run(gated, batch))
    loss = divergence(output, dense, batch, temperature, values=state_of(gated).gives_values).mean()
    known = OpenGates(watched, teacher.streams, teacher.masks)
    return loss + _STREAM * stream_error(student.streams, known, dict(layouts)).mean()


def _distance(gated: nn.Module, data: Iterable[Any] | None, levels: Sequence[int]) -> float:
    """Mean divergence of two of the static policies from the dense model."""
    if data is None:
        return float("inf")
    state, parts = state_of(gated), []
    order, scale = state.order, Scale()
    with torch.no_grad():
        for one in batches(data):
            batch = place(one, gated)
            with execution(gated, "dense"):
                dense = read_output(run(gated, batch))
            scale.add(dense, batch, values=state.gives_values)
            for share in _LOOKS:
                cut = order[: levels[round(share * (len(levels) - 1))]]
                with force(gated, {name: name not in cut for name in order}):
                    output = read_output(run(gated, batch))
                    parts.append(apart(output, dense, batch, values=state.gives_values, scale=1.0))
    return float(torch.cat(parts).mean()) / scale.value


@dataclass(slots=True)
class NestedGates:
    """Gate handler: the first rows of a batch skip, another number of them at every site.

    Args:
        skipped: How many, by site.
        watched: Sites before which the residual stream is kept.
    """

    skipped: Mapping[str, int]
    watched: frozenset[str] = frozenset()
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        if gate.site.name in self.watched:
            self.streams[gate.site.name] = residual
        count, size = self.skipped.get(gate.site.name, 0), len(residual)
        if count == 0:
            return gate.open(branch, left, inputs)
        if branch.axes is None or branch.escapes or branch.stateful:
            decisions = torch.arange(size, device=residual.device) >= count
            if gate.per_token:
                decisions = gate.expand(decisions, residual[..., 0]).expand(residual.shape[:-1])
            return gate.mask(branch, left, residual, inputs, decisions)
        if count == size:
            return gate.closed(branch, left, residual)
        kept = slice(count, size)
        value = branch(*(take_samples(v, axes, kept, size) for v, axes in zip(inputs, branch.axes, strict=True)))
        term = torch.cat((gate.skip_path(residual[:count]), value))
        return term if left is None else left + term


@dataclass(slots=True)
class _Watched:
    """Gate handler: the dense model, with the residual stream kept before the watched sites."""

    watched: frozenset[str]
    streams: dict[str, Tensor]
    masks: dict[str, Tensor | None] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        """Execute one gate."""
        if gate.site.name in self.watched:
            self.streams[gate.site.name] = residual.clone()  # an activation may go on in place
            self.masks[gate.site.name] = gate.padding(residual)
        return gate.open(branch, left, inputs)
