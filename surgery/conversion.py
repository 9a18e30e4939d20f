"""`convert`: the whole pipeline, readable from top to bottom.

find_sites -> plan -> insert_gates -> fit_skip_paths -> cut_order -> regress_routers -> calibrate -> train_routers ->
calibrate (-> heal -> calibrate) -> calibrate_second_look

Where every gate decides per sample, skip paths are trained for static policies first (`train_skip_paths`), routers only if the
static policy of the same cost is then no nearer to dense, and routing runs only if it is nearer after that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from surgery.adaptation import KINDS as HEALING
from surgery.adaptation import check_healable
from surgery.adaptation import heal as heal_backbone
from surgery.calibration import calibrate, check_floor
from surgery.calling import Batch, Outputs, as_batch, batches, evaluating
from surgery.choosing import Snapshot, keep_the_better, prefer_static_where_it_wins
from surgery.context import state_of
from surgery.costs import place
from surgery.cutting import cut_order
from surgery.errors import BudgetError, SurgeryError, check_budget, check_choice, check_count
from surgery.finding import check_weights, find_sites
from surgery.fitting import fit_skip_paths
from surgery.gates import iter_gates
from surgery.labelling import why_no_gradient
from surgery.latency import check_time_floor
from surgery.look_calibration import calibrate_second_look
from surgery.made_inputs import made_inputs
from surgery.nesting import CHECKPOINT as NESTED
from surgery.nesting import interrupted_at, train_skip_paths
from surgery.options import Options
from surgery.orders import settle_order
from surgery.planning import ROUTER_LIMIT
from surgery.progress import Progress, silent
from surgery.regression import regress_routers
from surgery.resuming import CHECKPOINT as TRAINING
from surgery.resuming import find_checkpoint, forget_checkpoints
from surgery.rewriting import check_convertible, insert_gates
from surgery.sites import KINDS, Cost, Granularity, Plan, Routers, Sites, SkipKind
from surgery.splitting import Head, check_reiterable, split
from surgery.training import count_steps, train_routers

_CUT_SAMPLES = 128  # a quarter where every sample holds many tokens
_ROUNDS = 3  # cut orders of which the best is trained
_WHOLE_TEXTS = (
    "decisions per sample read the whole of a call: a whole text where one is scored, later tokens included, and single tokens "
    "while one is generated with a cache; granularity='prefill' decides both alike, from the prompt"
)


class UnmeasuredQuality(UserWarning):
    """The model was converted without data, so nobody knows how much accuracy it keeps."""


@torch.inference_mode(False)
def convert(
    model: nn.Module,
    budget: float,
    *,
    data: Iterable[Any] | None = None,
    validation: Iterable[Any] | None = None,
    example: Any = None,
    sites: Sites | Sequence[str] | None = None,
    granularity: Granularity | Literal["auto"] = "auto",
    tune: Literal["auto", "oneshot", "routers", "train"] = "auto",
    skip: SkipKind | Literal["auto"] = "auto",
    width: float | Literal["auto"] = "auto",
    second_look: bool | Literal["auto"] = "auto",
    first_tokens: int | Literal["auto"] = "auto",
    first_layers: int | Literal["auto"] = "auto",
    routers: Routers = "own",
    cost: Cost = "flops",
    heal: Literal["norms", "lora"] | None = None,
    outputs: Outputs = "auto",
    options: Options | None = None,
    samples: int = 2048,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> nn.Module:
    """Turn a pretrained network into one that decides, input by input, what it skips.

    Args:
        model: Any pretrained module; it is not changed, stays dense, and shares its weights with the result.
        budget: Target mean cost as a fraction of the dense model's, in (0, 1].
        data: Re-iterable batches (a tensor, `(inputs, labels)`, or a dict of keyword arguments). Labels are not needed.
            Without data, inputs are made up for timm and transformers models, and a warning says that quality is
            unmeasured.
        validation: Batches to calibrate on; every fifth batch of `data` by default.
        example: What the model is called with; the first batch of `data` by default.
        sites: What may be skipped: `Sites`, or kinds and name patterns such as `["mlp", "layer3.*"]`; all by default.
        granularity: `token`, `sample`, `prefill` (once per text, from its prompt), or `auto` for the finest that each site
            allows.
        tune: `oneshot` fits in closed form and from harm labels, in seconds to minutes; `train` adds distillation, and
            `routers` distillation of routers alone, while skip paths stay as they were fitted;
            `auto` trains when there is data.
        skip: Kind of skip path, or `auto`.
        width: Share of a branch's hidden channels that `narrow` skip paths keep, in (0, 1); `auto` goes by the budget.
        second_look: Whether inputs of which the gated pass is not sure are run again in full, within the same budget;
            `auto` where that brings held-out outputs nearer to the dense model's (classifiers only).
        first_tokens: For how many first tokens of every sequence all gates per token stay open; `auto` is none.
        first_layers: In how many first layers all gates stay open; `auto` is none.
        routers: `own`, or `shared` where an MLP's router may read the hidden features of the attention's before it
            (docs/routers.md).
        cost: What the budget counts: `flops`, or `latency` on this device.
        heal: Whether to adapt the backbone a little as well, as copies of its `norms` or by `lora` (docs/healing.md); the
            dense model stays within the result bit for bit.
        outputs: Whether the model gives `logits`, of which the largest counts, or `values` (a regression, an embedding);
            `auto` takes a plain `(N, K)` tensor for logits unless the model says otherwise (docs/quickstart.md).
        options: How to train.
        samples: Number of samples to fit routers on.
        seed: Seed of everything random.
        output_dir: Where training keeps its checkpoint, for `resume`; those of an earlier conversion go unless it is set.
        resume: Continue an interrupted training in `output_dir`.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        A module of the same class, called in the same way. Its mean cost on held-out data is within 0.01 of the budget, or,
        where the static policy runs, the largest that some set of sites has at most; within 0.02 of a budget in time. Second
        looks leave a reserve against chance (docs/second_look.md), by which it is lower.

    Raises:
        BudgetError: If the budget is outside (0, 1] or cannot be reached.
        NoSites: If nothing can be skipped.
        DataError: If the data yields nothing, can be read only once, or is refused by the model.
        UnsupportedModel: If it is no module, or on the meta device.
        AlreadyConverted: If the model carries gates.
        CheckpointError: If `resume` is set and `output_dir` holds nothing to resume.
        MissingDependency: If `heal` needs a library that is not installed.
        SurgeryError: If `tune`, `cost`, `granularity`, `skip`, `routers`, `second_look`, `heal` or `outputs` is none of the
            above, `samples` or `seed` is no number, or healing is asked for without data.
    """
    budget = check_budget(budget)
    check_convertible(model)
    check_weights(model)
    check_choice("tune", tune, ("auto", "oneshot", "routers", "train"))
    check_choice("cost", cost, get_args(Cost))
    check_choice("second_look", second_look, ("auto", True, False))
    check_choice("heal", heal, (None, *HEALING))
    check_choice("outputs", outputs, get_args(Outputs))
    check_count("samples", samples, 1)
    check_count("seed", seed)
    if heal is not None and data is None:
        raise SurgeryError("healing learns from the dense model's answers to your inputs: give data=… with heal=…")
    report = progress or silent
    options = options or Options()
    if tune == "routers":
        options = replace(options, skip_rate=0.0, nested_rate=0.0)
    made = data is None
    trains = tune in ("routers", "train") or (tune == "auto" and not made and budget < 1)
    if data is None:
        data = made_inputs(model, example, seed)
    check_reiterable(data)
    fit, held = split(data, validation)
    held = list(batches(Head(held, max(samples // 4, 64))))  # kept, since augmented data differ from pass to pass
    if trains:
        count_steps(fit, options)
    if resume and not interrupted_at(output_dir):
        find_checkpoint(output_dir)

    report("finding sites", 0, None)
    called = example if example is not None or isinstance(sites, Sites) else place(first(fit), model)
    found = sites if isinstance(sites, Sites) else find_sites(model, called)
    if not isinstance(sites, Sites) and sites:
        found = select(found, sites)

    def gate_all(trained: bool) -> tuple[Plan, nn.Module]:
        """The plan, and the network with its gates, for skip paths that are trained or not."""
        plan = found.plan(
            granularity=granularity,
            skip=skip,
            width=width,
            first_tokens=first_tokens,
            first_layers=first_layers,
            routers=routers,
            cost=cost,
            budget=min((budget, *(options.budgets or ())[:1])),
            trained=trained and options.skip_rate > 0,
        )
        gated = insert_gates(model, plan)
        state_of(gated).outputs = outputs
        return plan, gated

    plan, gated = gate_all(trains)
    if trains or heal:
        asked = "healing" if heal else "training" if tune in ("routers", "train") else ""
        reason = untrainable(gated, as_batch(called), asked)
        if reason:
            trains = False
            plan, gated = gate_all(trains)
            state_of(gated).note(f"not trained, since {reason}; fitted from forward passes")
    state = state_of(gated)
    for text in (*plan_notes(found, plan, granularity, width, routers), *dear_routers(gated)):
        state.note(text)
    check_reachable(gated, held, budget, cost)
    if heal is not None and budget < 1:
        check_healable(gated, heal)

    training: dict[str, Any] = {"options": options, "seed": seed, "validation": held, "output_dir": output_dir}
    if not resume:
        forget_checkpoints(output_dir, (NESTED, TRAINING))
    fit_skip_paths(gated, fit, seed=seed, progress=report)
    per_sample = state.units == state.names and not any(gate.per_token for _, gate in iter_gates(gated))
    if per_sample and (trains or budget < 1):  # refits skip paths on what static policies leave
        rounds = _ROUNDS if trains else 1
        settle_order(gated, fit, held, rounds=rounds, samples=_CUT_SAMPLES, seed=seed, progress=report)
    elif budget < 1:
        cut_order(gated, fit, samples=_CUT_SAMPLES // 4, progress=report)
    if trains and per_sample:
        train_skip_paths(gated, fit, budget=budget, resume=resume, progress=report, **training)
    regress_routers(gated, fit, samples=samples, seed=seed, labels=options.harm_labels, progress=report)
    calibrate(gated, held, budget, cost=cost, progress=report)

    is_static = trains and per_sample and prefer_static_where_it_wins(gated, held)
    if trains and not is_static:
        before = Snapshot.of(gated, held)
        interrupted = resume and output_dir is not None and (Path(output_dir) / TRAINING).exists()
        train_routers(gated, fit, budget=budget, resume=interrupted, progress=report, **training)
        calibrate(gated, held, budget, cost=cost, progress=report)
        keep_the_better(gated, held, before, budget)
    if budget < 1 and not is_static:
        prefer_static_where_it_wins(gated, held, ties=trains and per_sample)
    if budget < 1 and heal is not None:
        heal_backbone(gated, fit, heal, options=options, seed=seed, validation=held, progress=report)
        calibrate(gated, held, budget, cost=cost, progress=report)
    if budget < 1 and second_look:
        calibrate_second_look(gated, held, mode="auto" if second_look == "auto" else True, progress=report)
    if made:
        state.note("converted without data: the quality is unmeasured")
        warnings.warn(
            "converted without data: the budget holds on made-up inputs and the quality is unmeasured; "
            "pass data=..., or check with surgery.measure(gated, data)",
            UnmeasuredQuality,
            stacklevel=2,
        )
    return gated


def check_reachable(gated: nn.Module, held: Iterable[Any], budget: float, cost: Cost) -> None:
    """Refuse a budget that is out of reach with every gate closed, before anything is fitted.

    Raises:
        BudgetError: If it is.
    """
    if cost == "flops":
        check_floor(gated, budget)
    elif budget < 1:
        check_time_floor(gated, held, budget)


def untrainable(gated: nn.Module, batch: Batch, asked: str) -> str:
    """Why nothing can be trained, as a clause, or an empty one.

    Raises:
        SurgeryError: If so, and it was `asked` for: training, healing, or an empty text.
    """
    with evaluating(gated):
        reason = why_no_gradient(gated, place(batch, gated))
    if reason and asked:
        instead = "this model cannot be healed" if asked == "healing" else "use tune='oneshot', which does without"
        raise SurgeryError(f"{asked} learns by gradients, and {reason}; {instead}")
    return reason


def plan_notes(
    sites: Sites,
    plan: Plan,
    granularity: Granularity | Literal["auto"],
    width: float | Literal["auto"],
    routers: Routers,
) -> Iterator[str]:
    """What a plan does not do although it was asked for, and what it means for texts."""
    if sites.causal and any(planned.granularity == "sample" for planned in plan.sites):
        yield _WHOLE_TEXTS
    if width != "auto" and not any(planned.skip == "narrow" for planned in plan.sites):
        yield f"width {width:g} changes nothing: no site has a narrow skip path"
    if routers == "shared" and not any(planned.leader for planned in plan.sites):
        yield "routers 'shared' change nothing: no MLP comes right after an attention whose router it could read"
    if apart := [planned for planned in plan.sites if granularity not in ("auto", planned.granularity)]:
        names = ", ".join(f"{planned.site.name} (per {planned.granularity})" for planned in apart[:3])
        more = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
        yield f"granularity {granularity!r} is not possible at {len(apart)} of {len(plan.sites)} sites: {names}{more}"


def dear_routers(gated: nn.Module) -> Iterator[str]:
    """What to say where the routers cost more of the model than they should, as in narrow networks."""
    state = state_of(gated)
    limit = ROUTER_LIMIT["token" if any(gate.per_token for _, gate in iter_gates(gated)) else "sample"]
    share = sum(site.router for site in state.costs.sites.values()) / state.costs.dense
    if share > 1.05 * limit:  # widths come in steps
        yield f"routers cost {100 * share:.1f} % of the model, since even narrow ones are much for one of this width"


@torch.inference_mode(False)
def heal_converted(
    gated: nn.Module,
    data: Iterable[Any],
    kind: Literal["norms", "lora"],
    *,
    validation: Iterable[Any] | None = None,
    options: Options | None = None,
    samples: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Heal a model that was converted before, as `convert(heal=…)` does: heal, calibrate for its budget anew, and look again
    where it did.

    Args:
        gated: A converted model whose budget is below 1.
        data: Re-iterable batches; every fifth is held out unless there is `validation`.
        kind: `norms` or `lora` (docs/healing.md).
        validation: Held-out batches.
        options: How long and at which rate; see `surgery.heal`.
        samples: Four times as many inputs as are held out to calibrate on, as in `convert`.
        seed: Seed of everything random.
        progress: Called while it works.

    Raises:
        BudgetError: If no budget below 1 is set.
        SurgeryError: If the model has nothing to heal of that kind, or no gradient goes through it.
        MissingDependency: If `lora` is asked for and peft is not installed.
        DataError: If the data yields nothing, or its length is unknown and `options.steps` is not given.
    """
    state = state_of(gated)
    fit, held = split(data, validation)
    held = list(batches(Head(held, max(samples // 4, 64))))
    looked = bool(state.looks)
    untrainable(gated, first(held), "healing")
    heal_backbone(gated, fit, kind, options=options, seed=seed, validation=held, progress=progress)
    calibrate_anew(gated, held, second_look=looked, progress=progress)


def calibrate_anew(
    gated: nn.Module, data: Iterable[Any], *, second_look: bool = True, progress: Progress | None = None
) -> None:
    """Make the budget of a converted model hold on other inputs than those it was converted with; nothing is trained.

    Args:
        gated: A converted model; its budget, and what that counts, stay.
        data: Batches of inputs as the model will get them; re-iterable.
        second_look: Whether to decide about second looks anew, or to leave them out.
        progress: Called while it works.

    Raises:
        BudgetError: If no budget is set, or it is out of reach.
        DataError: If the data yields nothing, or can be read only once.
    """
    state = state_of(gated)
    if state.budget is None:
        raise BudgetError("no budget is set: convert for one, or call surgery.calibrate with one")
    unit: Cost = "flops" if state.costs.unit == "flops" else "latency"
    calibrate(gated, data, state.budget, cost=unit, progress=progress)
    if second_look and state.budget < 1:
        calibrate_second_look(gated, data, progress=progress)


def select(sites: Sites, wanted: Sequence[str]) -> Sites:
    """Keep the sites whose kind or name pattern is in `wanted`.

    Raises:
        NoSites: If nothing is left.
    """
    if isinstance(wanted, str):
        wanted = [wanted]
    kinds = [w for w in wanted if w in KINDS]
    patterns = [w for w in wanted if w not in KINDS]
    if kinds and patterns:
        return sites.filter(*patterns, kind=kinds)
    return sites.filter(*patterns, kind=kinds or None)


def first(data: Iterable[Any]) -> Batch:
    """The first batch, at most eight rows of it."""
    batch = next(batches(data))
    return replace(batch, labels=None).rows(torch.arange(min(8, batch.size)))
