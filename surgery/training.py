"""`train_routers`: routers and skip paths learn together, by distillation from the dense model, for a range of budgets.

Every step draws a budget, runs the batch at the threshold that gives it (`surgery.pacing`), and compares logits and
residual streams with the dense model's. Gradients of decisions pass straight through (`surgery.straight_through`); the
price of compute is the one at which opening a little more everywhere would neither help nor harm, so that routers learn
where to spend and never how much. One set of weights so serves all budgets.

Every process of `accelerate launch` reads the same batches and takes its share of the rows of each, and noise is drawn
for the whole batch, so that any number of processes computes the same steps.

Axis letters: `N` samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.auxiliary import diversity_gradients, harm_gradients
from surgery.calling import Batch, batches, check_batches, device_of, length_of, read_output
from surgery.context import handled, state_of
from surgery.costs import place, run
from surgery.errors import CheckpointError, DataError, SurgeryError, check_budget
from surgery.gates import iter_gates
from surgery.harm import label_harm
from surgery.held_out import HeldOut
from surgery.objectives import divergence
from surgery.options import HIGHEST, LOWEST, PRECISIONS, Options
from surgery.pacing import Pace
from surgery.progress import Progress, silent
from surgery.rates import clip, one_cycle, parameter_groups
from surgery.resuming import CHECKPOINT, find_checkpoint, read_checkpoint, write_checkpoint
from surgery.straight_through import OpenGates, SoftGates, prices, router_gradients, stream_error, watched_sites

_CLIP = 1.0
_ABOVE_CLOSED = 0.02  # nothing can be learnt where every gate is closed
_LOOKS = 5  # how often a training looks at held-out data
_APART = 0.05  # budgets that are nearer to each other are one
_FREE = ("epochs", "steps", "save_every")  # options that may change when a training goes on


@dataclass(slots=True)
class History:
    """What happened at every optimiser step; `columns()` is ready to plot."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def columns(self) -> dict[str, list[float]]:
        """Column name (step, loss, divergence, stream, cost, target, threshold, price; held_divergence,
        held_cost and held_score where held-out data was looked at, else NaN) -> values."""
        return {key: [row.get(key, math.nan) for row in self.rows] for key in self._keys()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {"rows": self.rows}

    def _keys(self) -> dict[str, None]:
        return dict.fromkeys(key for row in self.rows for key in row)


@torch.inference_mode(False)
def train_routers(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    budget: float,
    options: Options | None = None,
    seed: int = 0,
    validation: Iterable[Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    tracker: Any = None,
    progress: Progress | None = None,
) -> History:
    """Train routers and skip paths; no backbone tensor changes.

    Args:
        gated: A gated model; start from fitted skip paths and routers and a calibrated threshold.
        data: Re-iterable batches; labels are used only with `options.label_weight`.
        budget: The budget that matters most, as a fraction of dense, in (0, 1].
        options: See `Options`.
        seed: Seed of the noise and of the budgets drawn.
        validation: Held-out batches. The model is run on them before training and five times during it, at `budget` and at the
            smallest budget trained for, and the weights that were nearest to the dense model are kept; without, the last
            ones.
        output_dir: Where to keep a checkpoint to resume from; written atomically, also on Ctrl-C.
        resume: Continue from the checkpoint in `output_dir`.
        tracker: An `accelerate.Accelerator` of the caller's with trackers initialised; its `log` gets every row.
        progress: Called after every step.

    Returns:
        The history of all steps, those before a resume included.

    Raises:
        BudgetError: If the budget is outside (0, 1].
        DataError: If the data yields nothing, or its length is unknown and `options.steps` is not given.
        CheckpointError: If `resume` is set and there is no checkpoint, or it is of another model or of other options.
        SurgeryError: If nothing is to be trained, or no gradient of the output reaches a gate.
    """
    budget = check_budget(budget)
    training = _Run(gated, data, budget, options or Options(), seed, validation, output_dir, tracker)
    if resume:
        training.load()
    try:
        training.train(progress or silent)
    except KeyboardInterrupt:
        training.save()
        raise
    finally:
        training.clear()
        gated.eval()
    training.save()
    training.finish()
    return training.history


def trainable(gated: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that training may change, by its name in the state dict: routers and skip paths."""
    ours = {id(p) for _, gate in iter_gates(gated) for p in gate.parameters()}
    return {name: p for name, p in gated.named_parameters() if id(p) in ours}


class _Run:
    """One training run: what must be saved to continue it."""

    def __init__(
        self,
        gated: nn.Module,
        data: Iterable[Any],
        budget: float,
        options: Options,
        seed: int,
        validation: Iterable[Any] | None,
        output: Any,
        tracker: Any,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import is_initialized

        self.gated, self.data, self.budget, self.options, self.seed = gated, data, budget, options, seed
        self.device = device_of(gated)
        # accelerate's device and precision are fixed once per process, so they are left alone and set here
        on_cpu = self.device.type == "cpu" and not is_initialized()
        self.accelerator = tracker or Accelerator(cpu=on_cpu)
        self.precision = PRECISIONS[options.mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.tracker = tracker
        self.path = None if output is None else Path(output) / CHECKPOINT
        self.state = state_of(gated)
        self.parameters = trainable(gated)
        self.routers = [p for _, g in iter_gates(gated) for p in g.router.parameters()]
        gates = [gate for _, gate in iter_gates(gated)]
        rates = {"router": options.router_rate, "skip_path": options.skip_rate}
        groups = [group for part, rate in rates.items() if rate > 0 for group in parameter_groups(gates, part, rate)]
        if not groups:
            raise SurgeryError(
                "nothing to train: router_rate is 0, and skip_rate is 0 or every skip path is the identity; give one of "
                "them a learning rate, as in Options(router_rate=1e-3)"
            )
        self.trained = [p for g in groups for p in g["params"]]
        self.total = count_steps(data, options)
        self.optimiser, self.schedule = one_cycle(groups, self.total)
        self.step = 0
        self.pace = self._pace()
        self.layouts = {p.site.name: p.site.layout for p in self.state.plan.sites}
        by_default = 0.0 if all(gate.per_token for _, gate in iter_gates(gated)) else 1.0
        self.stream_weight = by_default if options.stream_weight is None else options.stream_weight
        self.watched = watched_sites(self.state.names) if self.stream_weight > 0 else frozenset[str]()
        self.held = HeldOut(gated, validation, self._looked_at())
        self.history = History()
        self.kept: dict[str, Any] = {}

    def _pace(self) -> Pace:
        costs, options, budget = self.state.costs, self.options, self.budget
        closed = costs.cost(self.state.constant_rates(0.0)) + _ABOVE_CLOSED
        low, high = options.budgets or (min(budget, LOWEST), max(budget, HIGHEST))
        low = min(max(low, closed), 1.0)
        pace = Pace(low, max(low, high), options.anneal * self.total, self.seed)
        pace.start([(p.cost, p.threshold) for p in self.state.table] or self._here())
        return pace

    def _looked_at(self) -> list[float]:
        """The budgets that weights are compared at: the one that matters most, and the smallest that is trained for."""
        return [self.budget, self.pace.low] if self.budget - self.pace.low > _APART else [self.budget]

    def _here(self) -> list[tuple[float, float]]:
        return [(1.0, self.state.threshold)] if math.isfinite(self.state.threshold) else []

    def train(self, progress: Progress) -> None:
        """Run from the current step to the last one."""
        stream = stream_of(self.data, skip=self.step * self.options.accumulate)
        looks = {round(self.total * k / _LOOKS) for k in range(1, _LOOKS + 1)}
        self.keep()
        if self.step == 0:
            self.held.look(self.parameters)
        self.gated.train()
        with torch.enable_grad():
            while self.step < self.total:
                row = self._step([next(stream) for _ in range(self.options.accumulate)])
                self.step += 1
                if self.step in looks:
                    self.gated.eval()
                    row |= self.held.look(self.parameters)
                    self.gated.train()
                self.history.rows.append(row)
                self.keep()
                if self.tracker is not None:
                    self.tracker.log(row, step=self.step - 1)
                progress("training routers", self.step, self.total)
                if self.step % self.options.save_every == 0:
                    self.save()

    def finish(self) -> None:
        """Leave the best weights, and the threshold that gave the budget with them."""
        self.state.threshold = self.pace.threshold(self.budget)
        if self.held.best is not None:
            self.state.threshold = self.held.threshold
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.held.best[name])

    @property
    def keeps(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.path is not None and bool(self.accelerator.is_main_process)

    def keep(self) -> None:
        """Remember the step that just ended: Ctrl-C may come in the middle of the next one."""
        if not self.keeps:
            return
        self.kept = {
            "parameters": {name: p.detach().clone() for name, p in self.parameters.items()},
            "optimiser": copy.deepcopy(self.optimiser.state_dict()),
            "scaler": copy.deepcopy(self.scaler.state_dict()),
            "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))},
            "step": self.step,
            "total": self.total,
            "thresholds": copy.deepcopy(self.pace.thresholds),
            "best": self.held.state(),
            "offsets": {name: gate.offset for name, gate in iter_gates(self.gated)},
            "options": self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        """What must be as it was to go on; the number of steps is compared by itself."""
        options = {name: value for name, value in asdict(self.options).items() if name not in _FREE}
        return {"budget": self.budget, "seed": self.seed, **options}

    def save(self) -> None:
        """Write what was kept atomically, from the main process."""
        if self.path is not None and self.kept:
            write_checkpoint(self.path, {**self.kept, "history": self.history.rows[: self.kept["step"]]})

    def load(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: If there is none, or it is of another model.
        """
        path = find_checkpoint(None if self.path is None else self.path.parent)
        saved = read_checkpoint(path, self.parameters, self.total, self.held.state(), self._settings())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name])
        for name, gate in iter_gates(self.gated):
            gate.offset = saved["offsets"][name]
        try:
            self.optimiser.load_state_dict(saved["optimiser"])
        except ValueError as error:  # an older version had other groups
            raise CheckpointError(
                f"{path} is of another version: {error}; delete it to train from the start"
            ) from error
        self.schedule.load_state_dict(saved["schedule"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.pace.thresholds = saved["thresholds"]
        self.held.restore(saved["best"])
        self.history.rows = saved["history"]

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step(self, group: list[Batch]) -> dict[str, float]:
        self.clear()
        target = self.pace.target(self.step)
        threshold = self.pace.threshold(target)
        totals = torch.zeros(6, dtype=torch.float64)
        harms, costs = ([torch.zeros_like(p) for p in self.routers] for _ in range(2))
        for index, batch in enumerate(group):
            totals += self._backward(batch, index, threshold, 1 / len(group), harms, costs)
        loss, distance, stream, cost, pull, push = totals.tolist()
        # opening everything a little must not pay: what is left tells where to open, at the same cost
        price = max(0.0, -pull / push) if push > 0 else 0.0
        for parameter, harm, paid in zip(self.routers, harms, costs, strict=True):
            parameter.grad = harm + price * paid
        self._reduce_gradients()
        self.scaler.unscale_(self.optimiser)
        clip(self.trained, _CLIP)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        self.pace.correct(target, cost)
        return {
            "step": float(self.step),
            "loss": loss,
            "divergence": distance,
            "stream": stream,
            "cost": cost,
            "target": target,
            "threshold": threshold,
            "price": price / self.scaler.get_scale(),
        }

    def _backward(
        self, whole: Batch, index: int, threshold: float, share: float, harms: list[Tensor], costs: list[Tensor]
    ) -> Tensor:
        """Gradients of one batch. Those of skip paths go to `.grad`; the routers' are added to `harms` (of the loss) and
        `costs` (of the cost), since the price between the two depends on all batches.

        Returns:
            Over all processes: share of loss, divergence, stream error and cost, and the sums of the scores' gradients of
            the loss and of the cost.
        """
        options, processes = self.options, self.accelerator.num_processes
        rows = torch.arange(self.accelerator.process_index, whole.size, processes)
        batch = place(whole.rows(rows), self.gated)
        seed = (self.seed * 1_000_003 + self.step) * 64 + index
        soft = SoftGates(whole.size, rows, threshold, options.noise, seed, self.watched)
        teacher = OpenGates(self.watched)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            with torch.no_grad(), handled(self.gated, teacher):
                dense = read_output(run(self.gated, batch))
            with handled(self.gated, soft):
                output = read_output(run(self.gated, batch))
        values = state_of(self.gated).gives_values
        distance = divergence(output, dense, batch, options.temperature, values=values).sum() / whole.size
        if soft.decided and not distance.requires_grad:
            raise SurgeryError(
                "no gradient of the output reaches a gate (no_grad, inference_mode or detach in a forward), so nothing can be "
                "learned; regress_routers and calibrate do without, as convert(tune='oneshot') does"
            )
        stream = stream_error(soft.streams, teacher, self.layouts).sum() / whole.size
        loss = distance + self.stream_weight * stream
        if options.label_weight and batch.labels is not None and output.dim() == 2 and not values:
            labels = batch.labels if batch.labels.is_floating_point() else batch.labels.long()  # torch takes no others
            entropy = F.cross_entropy(output.float(), labels, reduction="sum")
            loss = loss + options.label_weight * entropy / whole.size
        each, spent, weight = prices(soft.decided, self.state.costs)
        sums = self._sum(loss, distance, stream, spent, weight)
        # gradients are averaged over processes afterwards, and every term is already a share of the whole batch
        factor = share * processes
        if loss.requires_grad:
            self.scaler.scale(factor * loss).backward()
        pulls = [torch.zeros_like(d.leaf) if d.leaf.grad is None else d.leaf.grad for d in soft.decided]
        pushes = [
            factor * price / sums[4].to(price) * d.probability * (1 - d.probability)
            for price, d in zip(each, soft.decided, strict=True)
        ]
        auxiliary = self._auxiliary(batch, soft, factor * self.scaler.get_scale())
        guided = [pull + more for pull, more in zip(pulls, auxiliary, strict=True)] if auxiliary else pulls
        for total, gradients in ((harms, guided), (costs, pushes)):
            for kept, gradient in zip(total, router_gradients(soft.decided, gradients, self.routers), strict=True):
                kept += gradient
        pull, push = self._sum(*(torch.stack([g.sum() for g in gs]).sum() for gs in (pulls, pushes)))
        ours = torch.stack((sums[0], sums[1], sums[2], sums[3] / sums[4])) * share
        return torch.cat((ours, torch.stack((pull, push)) / processes))

    def _auxiliary(self, batch: Batch, soft: SoftGates, factor: float) -> list[Tensor]:
        """Gradients of the scores for auxiliary targets, per gate; none where there are no such targets.

        They are not part of what the price of compute is found from: they say for which inputs, not how often.
        """
        options, found = self.options, []
        if options.harm_weight:
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                labels = label_harm(self.gated, batch, torch.Generator().manual_seed(soft.seed))
            found.append((options.harm_weight, harm_gradients(soft.decided, labels, self._total)))
        if options.diversity_weight:
            gradients = diversity_gradients(soft.decided, soft.threshold, self._total)
            found.append((options.diversity_weight, gradients))
        weighted = [[factor * weight * gradient for gradient in gradients] for weight, gradients in found]
        return [torch.stack(each).sum(0) for each in zip(*weighted, strict=True)]

    def _sum(self, *values: Tensor) -> Tensor:
        """Sums over all processes, float64 on the CPU."""
        return self._total(torch.stack([v.detach().float() for v in values])).double().cpu()

    def _total(self, value: Tensor) -> Tensor:
        """The sum of a float32 tensor over all processes."""
        total: Tensor = self.accelerator.reduce(value.detach().float(), "sum")
        return total

    def _reduce_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.parameters.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, "mean")
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)


def count_steps(data: Iterable[Any], options: Options) -> int:
    """Number of optimiser steps of a training.

    Raises:
        DataError: If the data holds nothing, or its length is unknown and `options.steps` is not given.
    """
    if options.steps is not None:
        return options.steps
    check_batches(data)
    count = length_of(data)
    if count is None:
        raise DataError(
            "the length of the training data is unknown (a stream); say how long to train: Options(steps=1000)"
        )
    if count == 0:
        raise DataError("the training data holds no batch")
    return max(1, options.epochs * count // options.accumulate)


def stream_of(data: Iterable[Any], skip: int = 0) -> Iterator[Batch]:
    """Batches for ever, the first `skip` left out."""
    count = 0
    while True:
        for batch in batches(data):
            count += 1
            if count > skip:
                yield batch
