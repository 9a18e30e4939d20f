"""`train_routers`: routers and skip paths learn together, by distillation from the dense model, under one budget.

Decisions are hard in the forward pass; gradients pass straight through (Bengio et al. 2013, with logistic noise as in
the Gumbel-sigmoid of Jang et al. 2017). The budget is one global constraint on the batch's mean realised cost, held by
a Lagrange multiplier towards a target that is annealed from where training starts.

Every process of `accelerate launch` reads the same batches and takes its share of the rows of each, and noise is drawn
for the whole batch, so that any number of processes computes the same steps.

Axis letters: `N` samples.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.calibration import check_budget
from surgery.calling import Batch, batches, device_of, length_of, read_output
from surgery.context import execution, handled, state_of
from surgery.costs import place, run
from surgery.errors import CheckpointError, DataError, SurgeryError
from surgery.gates import Branch, Gate, iter_gates
from surgery.objectives import divergence
from surgery.progress import Progress, silent

CHECKPOINT = "training.pt"
_PENALTY = 20.0
_MULTIPLIER_STEP = 0.5
_CLIP = 1.0
_PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Options:
    """How to train; every field has a default that was chosen by measurement (docs/results.md).

    Args:
        epochs: Passes over the data.
        steps: Number of optimiser steps; overrides `epochs` (needed for streaming data without a length).
        router_rate: Peak learning rate of routers.
        skip_rate: Peak learning rate of skip paths; 0 freezes them.
        noise: Scale of the logistic noise on scores.
        temperature: Softmax temperature of the distillation.
        anneal: Share of the steps in which the target falls from the starting cost to the budget.
        label_weight: Weight of cross-entropy with the labels, if the data has some.
        accumulate: Batches per optimiser step.
        save_every: Steps between checkpoints.
        mixed_precision: `no`, `fp16` or `bf16`.

    Raises:
        SurgeryError: If a number is out of range or the precision is unknown.
    """

    epochs: int = 3
    steps: int | None = None
    router_rate: float = 1e-3
    skip_rate: float = 1e-3
    noise: float = 0.3
    temperature: float = 2.0
    anneal: float = 0.25
    label_weight: float = 0.0
    accumulate: int = 1
    save_every: int = 100
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "accumulate", "save_every"):
            value = getattr(self, name)
            if not ((isinstance(value, int) and value >= 1) or (name == "steps" and value is None)):
                raise SurgeryError(f"Options.{name} must be a whole number of at least 1, got {value!r}")
        for name in ("router_rate", "skip_rate", "noise", "anneal", "label_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise SurgeryError(f"Options.{name} must be a number that is not negative, got {value!r}")
        if not 0 < self.temperature < math.inf:
            raise SurgeryError(f"Options.temperature must be a positive number, got {self.temperature!r}")
        if self.mixed_precision not in _PRECISIONS:
            raise SurgeryError(
                f"Options.mixed_precision must be one of {', '.join(_PRECISIONS)}, got {self.mixed_precision!r}"
            )


@dataclass(slots=True)
class History:
    """What happened at every optimiser step; `columns()` is ready to plot."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def columns(self) -> dict[str, list[float]]:
        """Column name (step, loss, divergence, cost, target, multiplier) -> values."""
        return {key: [row[key] for row in self.rows] for key in (self.rows[0] if self.rows else ())}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {"rows": self.rows}


def train_routers(
    gated: nn.Module,
    data: Iterable[Any],
    *,
    budget: float,
    options: Options | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    tracker: Any = None,
    progress: Progress | None = None,
) -> History:
    """Train routers and skip paths; no backbone tensor changes.

    Args:
        gated: A gated model; start from fitted skip paths and routers and a calibrated threshold.
        data: Re-iterable batches; labels are used only with `options.label_weight`.
        budget: Target mean cost as a fraction of dense, in (0, 1].
        options: See `Options`.
        seed: Seed of the noise.
        output_dir: Where to keep a checkpoint to resume from; written atomically, also on Ctrl-C.
        resume: Continue from the checkpoint in `output_dir`.
        tracker: An `accelerate.Accelerator` of the caller's with trackers initialised; its `log` gets every row.
        progress: Called after every step.

    Returns:
        The history of all steps, those before a resume included.

    Raises:
        BudgetError: If the budget is outside (0, 1].
        DataError: If the data yields nothing, or its length is unknown and `options.steps` is not given.
        CheckpointError: If `resume` is set and there is no checkpoint, or it is of another model.
    """
    check_budget(budget)
    training = _Run(gated, data, budget, options or Options(), seed, output_dir, tracker)
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
        self.precision = _PRECISIONS[options.mixed_precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        self.tracker = tracker
        self.path = None if output is None else Path(output) / CHECKPOINT
        self.state = state_of(gated)
        if not math.isfinite(self.state.threshold):
            self.state.threshold = 0.0
        self.parameters = trainable(gated)
        self.routers = [p for _, g in iter_gates(gated) for p in g.router.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": self.routers, "lr": options.router_rate},
            {"params": [p for _, g in iter_gates(gated) for p in g.skip_path.parameters()], "lr": options.skip_rate},
        ]
        groups = [g for g in groups if g["params"] and g["lr"] > 0]
        if not groups:
            raise SurgeryError(
                "nothing to train: router_rate is 0, and skip_rate is 0 or every skip path is the identity; give one of "
                "them a learning rate, as in Options(router_rate=1e-3)"
            )
        self.trained = [p for g in groups for p in g["params"]]
        self.total = count_steps(data, options)
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        peaks = [g["lr"] for g in groups]
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, peaks, total_steps=self.total + 1, pct_start=max(0.1, 2 / (self.total + 1))
        )
        self.step, self.multiplier, self.start = 0, 0.0, math.nan
        self.history = History()

    def train(self, progress: Progress) -> None:
        """Run from the current step to the last one."""
        stream = _stream(self.data, skip=self.step * self.options.accumulate)
        self.gated.train()
        with torch.enable_grad():
            while self.step < self.total:
                row = self._step([next(stream) for _ in range(self.options.accumulate)])
                self.history.rows.append(row)
                if self.tracker is not None:
                    self.tracker.log(row, step=self.step)
                self.step += 1
                progress("training routers", self.step, self.total)
                if self.step % self.options.save_every == 0:
                    self.save()

    def save(self) -> None:
        """Write the checkpoint atomically, from the main process."""
        if self.path is None or not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "parameters": {name: p.detach().cpu() for name, p in self.parameters.items()},
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule": {k: v for k, v in self.schedule.state_dict().items() if isinstance(v, (int, float, list))},
                "step": self.step,
                "total": self.total,
                "multiplier": self.multiplier,
                "start": self.start,
                "threshold": self.state.threshold,
                "offsets": {name: gate.offset for name, gate in iter_gates(self.gated)},
                "history": self.history.rows,
                "options": asdict(self.options),
            },
            part,
        )
        os.replace(part, self.path)

    def load(self) -> None:
        """Continue from the checkpoint.

        Raises:
            CheckpointError: If there is none, or it is of another model.
        """
        path = find_checkpoint(None if self.path is None else self.path.parent)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            shapes = {name: tuple(tensor.shape) for name, tensor in saved["parameters"].items()}
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {error}; delete it to train from the start") from error
        ours = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        differ = sorted(name for name in {*ours, *shapes} if ours.get(name) != shapes.get(name))
        if differ:
            raise CheckpointError(f"{self.path} is of another model or plan; tensors that differ: {differ[:6]}")
        if saved["total"] != self.total:
            raise CheckpointError(
                f"{self.path} is of a training over {saved['total']} steps, this one has {self.total}; resume with the same "
                "data and options"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved["parameters"][name])
        for name, gate in iter_gates(self.gated):
            gate.offset = saved["offsets"][name]
        self.optimiser.load_state_dict(saved["optimiser"])
        self.schedule.load_state_dict(saved["schedule"])
        if saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.multiplier, self.start = saved["step"], saved["multiplier"], saved["start"]
        self.state.threshold = saved["threshold"]
        self.history.rows = saved["history"]

    def clear(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def _step(self, group: list[Batch]) -> dict[str, float]:
        self.clear()
        share = 1 / len(group)
        totals = torch.zeros(3)
        prices = [torch.zeros_like(p) for p in self.routers]
        for index, batch in enumerate(group):
            totals += share * self._backward(batch, index, share, prices)
        loss, distance, cost = totals.tolist()
        if math.isnan(self.start):
            self.start = max(cost, self.budget)
        slope = self.multiplier + 2 * _PENALTY * max(cost - self._target(), 0.0)
        for parameter, price in zip(self.routers, prices, strict=True):
            price *= slope * self.scaler.get_scale()
            parameter.grad = price if parameter.grad is None else parameter.grad + price
        self._reduce_gradients()
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.trained, _CLIP)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.schedule.step()
        target = self._target()
        self.multiplier = max(0.0, self.multiplier + _MULTIPLIER_STEP * (cost - target))
        return {
            "step": float(self.step),
            "loss": loss,
            "divergence": distance,
            "cost": cost,
            "target": target,
            "multiplier": self.multiplier,
        }

    def _backward(self, whole: Batch, index: int, share: float, prices: list[Tensor]) -> Tensor:
        """Gradients of one batch; those of its cost are added to `prices`, since their factor depends on all batches.

        Returns:
            `(loss, divergence, cost)` over all processes.
        """
        options, processes = self.options, self.accelerator.num_processes
        rows = torch.arange(self.accelerator.process_index, whole.size, processes)
        batch = place(whole.rows(rows), self.gated)
        soft = _Soft(whole.size, rows, options.noise, (self.seed * 1_000_003 + self.step) * 64 + index)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            with torch.no_grad(), execution(self.gated, "dense"):
                dense = read_output(run(self.gated, batch))
            with handled(self.gated, soft):
                output = read_output(run(self.gated, batch))
        distance = divergence(output, dense, batch, options.temperature).sum() / whole.size
        loss = distance
        if options.label_weight and batch.labels is not None and output.dim() == 2:
            loss = (
                loss
                + options.label_weight * F.cross_entropy(output.float(), batch.labels, reduction="sum") / whole.size
            )
        spent, weight = soft.spent(self.gated)
        sums = self.accelerator.reduce(
            torch.stack((loss.detach(), distance.detach(), spent.detach(), weight.detach())), "sum"
        )
        # gradients are averaged over processes afterwards, and every term is already a share of the whole batch
        factor = share * processes
        found = torch.autograd.grad(factor * spent / sums[3], self.routers, retain_graph=True, allow_unused=True)
        for price, gradient in zip(prices, found, strict=True):
            if gradient is not None:
                price += gradient
        if loss.requires_grad:
            self.scaler.scale(factor * loss).backward()
        return torch.stack((sums[0], sums[1], sums[2] / sums[3])).cpu()

    def _target(self) -> float:
        done = min(1.0, self.step / max(1.0, self.options.anneal * self.total))
        return self.start + done * (self.budget - self.start)

    def _reduce_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.parameters.values())
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, "mean")
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)


@dataclass(slots=True)
class _Soft:
    """Gate handler: hard decisions forward, gradients straight through."""

    size: int
    rows: Tensor
    noise: float
    seed: int
    used: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def __call__(self, gate: Gate, branch: Branch, left: Tensor | None, residual: Tensor, inputs: Sequence[Any]) -> Any:
        output = branch(*inputs)
        value, *escaped = output if branch.escapes else (output,)
        logits = gate.scores(residual.detach()) - gate.threshold
        logits = logits + self._noise(logits)
        probability = torch.sigmoid(logits)
        hard = logits > 0
        skipped = gate.skip_path(residual)
        term = torch.where(gate.expand(hard, value), value, skipped)
        gradient_only = gate.expand(probability - probability.detach(), value).to(value.dtype)
        term = term + gradient_only * (value - skipped).detach()
        self.used[gate.site.name] = (
            hard.float() + probability - probability.detach(),
            gate.padding(residual) if gate.per_token else None,
        )
        result = term if left is None else left + term
        return (result, *escaped) if branch.escapes else result

    def _noise(self, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed * 997 + len(self.used)) % (2**63))
        uniform = torch.rand((self.size, *logits.shape[1:]), generator=generator)[self.rows].clamp(1e-4, 1 - 1e-4)
        return self.noise * torch.logit(uniform).to(logits.device)

    def spent(self, gated: nn.Module) -> tuple[Tensor, Tensor]:
        """Weighted sum of the samples' costs, and the sum of the weights."""
        costs = state_of(gated).costs
        constant = costs.fixed + sum(site.router + site.skip for site in costs.sites.values())
        total: Tensor | float = constant / costs.dense
        counts = next((w.float().sum(1) for _, w in self.used.values() if w is not None), None)
        for name, (active, padding) in self.used.items():
            site = costs.sites[name]
            flat = active.flatten(1) if active.dim() > 1 else active[:, None]
            if padding is None:
                rate = flat.mean(1)
            else:
                weights = padding.float().flatten(1)
                rate = (flat * weights).sum(1) / weights.sum(1).clamp_min(1)
            total = total + rate * ((site.branch - site.skip) / costs.dense)
        assert isinstance(total, Tensor)
        weights = torch.ones_like(total) if counts is None else counts
        return (total * weights).sum(), weights.sum()


def find_checkpoint(output_dir: str | Path | None) -> Path:
    """The checkpoint of an interrupted training.

    Raises:
        CheckpointError: If there is none.
    """
    if output_dir is None:
        raise CheckpointError(
            "nothing to resume: no output directory was given; pass the one of the interrupted training"
        )
    path = Path(output_dir) / CHECKPOINT
    if not path.exists():
        raise CheckpointError(f"nothing to resume: {path} does not exist; train without resume first")
    return path


def count_steps(data: Iterable[Any], options: Options) -> int:
    """Number of optimiser steps of a training.

    Raises:
        DataError: If the data holds nothing, or its length is unknown and `options.steps` is not given.
    """
    if options.steps is not None:
        return options.steps
    count = length_of(data)
    if count is None:
        raise DataError(
            "the length of the training data is unknown (a stream); say how long to train: Options(steps=1000)"
        )
    if count == 0:
        raise DataError("the training data holds no batch")
    return max(1, options.epochs * count // options.accumulate)


def _stream(data: Iterable[Any], skip: int) -> Iterator[Batch]:
    """Batches for ever, the first `skip` left out."""
    count = 0
    while True:
        for batch in batches(data):
            count += 1
            if count > skip:
                yield batch
