"""Peers: other answers to the same inputs at the same cost, which `measure` puts beside a gated model.

Axis letters: `N` samples, `S` sites, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery import policies
from surgery.budgets import at_point, current_point
from surgery.calling import Batch, Outputs, call, is_logits, read_output
from surgery.context import Event, Tape, force, override, state_of, tape
from surgery.costs import Decided
from surgery.errors import DataError
from surgery.healing import unhealed
from surgery.model_timing import Prepared
from surgery.policies import decided
from surgery.reports import Other, Peer
from surgery.scoring import Scores, agreement_of, metric_of, predicted
from surgery.second_look import given_to_others, least_certain, margin_of
from surgery.timing import Ratio, Thunk

ORDER = ("unhealed", "one pass", "static", "static+look", "frozen", "importance", "random", "shuffled")
"""The peers that share the gates and skip paths, as they are listed."""
_LOOKS = (0.0, 0.06, 0.12, 0.2)  # what a static cut at least leaves for second looks, of which the best is taken
_MOST = 0.6
_ROUNDING = 1e-9  # differences of means below it are none: a cut of the same cost is interpolated
_FEWEST = 20  # inputs without which a share of second looks cannot be told from chance


@dataclass(slots=True)
class Parts:
    """What one peer answered, batch by batch."""

    scores: list[Scores] = field(default_factory=list)
    agreements: list[Scores] = field(default_factory=list)
    decisions: list[Decided] = field(default_factory=list)
    margins: list[Tensor] = field(default_factory=list)
    """Of class logits, float64 `(N,)`."""
    top: list[Tensor] = field(default_factory=list)
    """The class that class logits speak for, `(N,)`."""

    @property
    def agreement(self) -> Scores:
        """With the dense model."""
        return Scores.joined(self.agreements)

    @property
    def score(self) -> Scores:
        """The metric's, or the agreement's where there is none."""
        return Scores.joined(self.scores or self.agreements)

    @property
    def decided(self) -> Decided:
        """What the gates did."""
        return Decided.joined(self.decisions)


@dataclass(slots=True)
class Judge:
    """Scores outputs by the metric that fits the dense model and the labels."""

    reference: nn.Module
    names: Sequence[str]
    outputs: Outputs = "auto"
    metric: str | None = None
    agreed: str = "argmax"
    started: bool = False

    def add(self, parts: Parts, batch: Batch, output: Any, dense: Any, events: Sequence[Event] | None) -> None:
        """Take one batch's output; `events` are what the gates did, None where there are none.

        Raises:
            DataError: If this batch can be scored in another way than those before it.
        """
        found = metric_of(self.reference, batch, output, self.outputs)
        name = None if found is None else found[0]
        if not self.started:
            self.metric, self.started = name, True
        if name != self.metric:
            raise DataError(f"some batches can be scored by {self.metric or 'agreement only'}, others by {name}")
        if found is not None:
            parts.scores.append(found[1])
        if dense is not None:
            self.agreed, agreement = agreement_of(self.reference, batch, output, dense, self.outputs)
            parts.agreements.append(agreement)
        if events is not None:
            parts.decisions.append(Decided.of(events, self.names, batch.size))
        logits = read_output(output)
        if logits.dim() == 2 and is_logits(self.reference, batch, output, self.outputs):
            parts.margins.append(margin_of(logits).double().cpu())
            parts.top.append(predicted(logits).cpu())


class Contest:
    """The second pass over the data: every peer at the rates and the cost of the gated model.

    Args:
        gated: A gated model.
        judge: As in the first pass.
        ours: What the gated model answered.
        shuffled: What its decisions, given to other inputs, led to.
        dense: What the dense model answered.
        importance: Block importance by site.
        others: Other networks.
        seed: Of random decisions and of the bootstrap.
    """

    def __init__(
        self,
        gated: nn.Module,
        judge: Judge,
        ours: Parts,
        shuffled: Parts,
        dense: Parts,
        importance: dict[str, float],
        others: Sequence[Other],
        seed: int,
    ) -> None:
        self.gated, self.judge, self.ours, self.shuffled, self.dense = gated, judge, ours, shuffled, dense
        self.others, self.seed = others, seed
        self.state, self.names = state_of(gated), judge.names
        self.rates = ours.decided.first_rate
        self.cost = ours.decided.cost(self.state.costs)
        ranks, costs = self.state.ranks(self.rates), self.state.costs
        self.absent: dict[str, str] = {}
        self.cuts = {
            "static": policies.cut(costs, ranks, self.cost),
            "importance": policies.cut(costs, self.state.above(importance), self.cost),
        }
        if not self.state.order:
            self.absent["frozen"] = "the same as static: no cut order was measured, so sites are cut by active rate"
        elif self.state.policy == "static":
            self.absent["frozen"] = "no router runs, so there is nothing to freeze"
        else:
            self.cuts["frozen"] = policies.cut(costs, self.state.above(self.rates), self.cost)
        self.bases = self._bases(ranks)
        self.one_pass = self.state.margin is not None
        if not self.one_pass:
            self.absent["one pass"] = "the gated model has no second look"
        itself = {"one pass": self.one_pass, "unhealed": self.state.healing is not None}
        self.itself = [name for name, applies in itself.items() if applies]
        kept = {names for one in self.cuts.values() for names in (one.lower, one.upper)} | set(self.bases)
        self.parts: dict[Any, Parts] = {names: Parts() for names in kept}
        self.parts |= {key: Parts() for key in ("random", *self.itself)}
        self.parts |= {("other", other.name): Parts() for other in others}
        self.start = 0

    def _bases(self, ranks: dict[str, float]) -> list[tuple[str, ...]]:
        """Static policies that leave something for second looks."""
        if not self.ours.margins or self.judge.metric not in (None, "accuracy"):
            self.absent["static+look"] = "a second look needs class logits (N, K)"
            return []
        found = []
        for share in _LOOKS:
            one = policies.cut(self.state.costs, ranks, self.cost - share)
            price = policies.static_cost(self.state.costs, one.lower)
            if 0 <= self.cost - price <= _MOST and one.lower not in found:
                found.append(one.lower)
        inputs = sum(map(len, self.ours.margins))
        if not found:
            self.absent["static+look"] = f"no static policy costs between {self.cost - _MOST:.3f} and {self.cost:.3f}"
        elif inputs < _FEWEST:
            self.absent["static+look"] = f"a share of {inputs} inputs is no measure; it takes {_FEWEST}"
            return []
        return found

    def needs_dense(self, looked: Tensor | None) -> bool:
        """Whether the dense model's output on this batch is used."""
        return self.judge.metric is None or looked is not None

    def see(self, batch: Batch, dense: Any, looked: Tensor | None) -> None:
        """Let every peer answer one batch; `looked` are the rows that the gated model looked at again."""
        for key, parts in self.parts.items():
            events: Tape | None = None
            if isinstance(key, tuple) and key[:1] == ("other",):
                output = call(self._other(key[1]).model, batch)
            elif key in self.itself:
                with _ITSELF[key](self.gated), tape(self.gated) as events:
                    output = call(self.gated, batch)
            else:
                with decided(self.gated, self._choice(key)) as events:
                    output = call(self.gated, batch)
                if key == "random" and looked is not None:
                    output, rows = given_to_others(output, dense, looked, self.seed)
                    events.looked.append(rows)
            self.judge.add(parts, batch, output, dense, events)
        self.start += batch.size

    def _choice(self, key: Any) -> policies.Choose:
        if key == "random":
            return policies.random(self.rates, self.seed, self.start)
        return policies.constant(key)

    def _other(self, name: str) -> Other:
        return next(other for other in self.others if other.name == name)

    # -- what came of it ------------------------------------------------------------------------------------------

    def rows(self, resamples: int, times: dict[int, dict[Any, Ratio]]) -> tuple[Peer, ...]:
        """Every peer's score and its difference to ours; `times` by batch size and key of `runs`."""
        found: dict[str, Peer] = {}
        costs = self.state.costs

        def add(name: str, cost: float, score: Scores, speed: dict[int, Ratio]) -> None:
            ours = self.ours.score
            gaps = (ours.mean - score.mean, *interval(ours, score, resamples, self.seed))
            difference, low, high = (0.0 if abs(gap) < _ROUNDING else gap for gap in gaps)
            found[name] = Peer(name, cost, score.mean, difference, low, high, speed)

        def timed(key: Any) -> dict[int, Ratio]:
            return {size: by_key[key] for size, by_key in times.items() if key in by_key}

        for name, one in self.cuts.items():
            lower, upper = self.parts[one.lower].score, self.parts[one.upper].score
            low, high = (policies.static_cost(costs, names) for names in (one.lower, one.upper))
            slow, fast = timed(one.upper), timed(one.lower)
            speed = {size: ratio.mixed(slow[size], one.share) for size, ratio in fast.items()}
            add(name, low + one.share * (high - low), lower.mixed(upper, one.share), speed)
        if self.bases:
            base, looked, _ = self.best_look()
            parts = self.parts[base]
            decisions = replace(parts.decided, looked=looked)
            add("static+look", decisions.cost(costs), self._answered(parts, looked), timed("static+look"))
        for name in (*self.itself, "random"):
            parts = self.parts[name]
            add(name, parts.decided.cost(costs), parts.score, timed(name))
        routed = replace(self.shuffled.decided, routed=self.ours.decided.routed)  # the routers had to run to decide
        add("shuffled", routed.cost(costs), self.shuffled.score, {})
        for other in self.others:
            key = ("other", other.name)
            add(other.name, other.cost, self.parts[key].score, timed(key))
        return tuple(sorted(found.values(), key=lambda row: ORDER.index(row.name) if row.name in ORDER else len(ORDER)))

    def best_look(self) -> tuple[tuple[str, ...], Tensor, float]:
        """The static first pass whose answers after second looks are nearest to the dense model's on this data, the
        inputs looked at again `(N,)`, and the margin below which they lie. Labels are not used, but the choice is made on
        the very inputs that are scored, in this peer's favour.
        """
        dense = torch.cat(self.dense.top)
        weights = self.ours.decided.weights.double()
        best: tuple[tuple[str, ...], Tensor, float] | None = None
        nearest = -1.0
        for base in self.bases:
            margins = torch.cat(self.parts[base].margins).nan_to_num(-1.0)
            share = self.cost - policies.static_cost(self.state.costs, base)
            looked = least_certain(margins, weights / weights.sum(), share)
            same = (looked | (torch.cat(self.parts[base].top) == dense)).double()
            agreement = float((same * weights).sum())
            if agreement > nearest:
                limit = float(margins[~looked].min()) if not bool(looked.all()) else 2.0
                best, nearest = (base, looked, limit), agreement
        assert best is not None
        return best

    def _answered(self, parts: Parts, looked: Tensor) -> Scores:
        ours, dense = parts.score, self.dense.score
        return Scores(torch.where(looked, dense.values, ours.values), ours.weights)

    # -- how it is run for the clock ------------------------------------------------------------------------------

    def runs(self) -> dict[Any, Prepared]:
        """How every peer runs a batch, to be timed. Random decisions are drawn beforehand; where they come with second
        looks, and where decisions are shuffled, nothing is timed.
        """
        gated = self.gated
        found: dict[Any, Prepared] = {}
        for one in self.cuts.values():
            for names in (one.lower, one.upper):
                found[names] = within(gated, partial(static_only, gated, names))
        if self.bases:
            base, _, limit = self.best_look()
            found["static+look"] = within(gated, partial(static_only, gated, base, limit))
        found |= {name: within(gated, partial(_ITSELF[name], gated)) for name in self.itself}
        if not self.one_pass:
            found["random"] = self._random
        for other in self.others:
            found["other", other.name] = within(other.model, nullcontext)
        return found

    def _random(self, batch: Batch) -> Thunk:
        with decided(self.gated, policies.random(self.rates, self.seed, 0)) as events:
            call(self.gated, batch)
        drawn = {event.site: event.decisions for event in events}
        return within(self.gated, lambda: force(self.gated, drawn))(batch)


def interval(ours: Scores, other: Scores, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the difference of two means on the same inputs, by resampling inputs with replacement."""
    generator = torch.Generator().manual_seed(seed)
    gap, weights = ours.values - other.values, ours.weights
    count = len(gap)
    means = []
    chunk = max(1, 2_000_000 // max(count, 1))
    for start in range(0, resamples, chunk):
        index = torch.randint(count, (min(chunk, resamples - start), count), generator=generator)
        means.append(gap[index].sum(1) / weights[index].sum(1).clamp_min(1e-12))
    ends = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


@contextmanager
def one_pass(gated: nn.Module) -> Iterator[None]:
    """Run `gated` without its second look inside the block: one pass gets the whole budget."""
    state = state_of(gated)
    with at_point(state, current_point(state)):
        yield


@contextmanager
def static_only(gated: nn.Module, kept: Sequence[str], margin: float | None = None) -> Iterator[None]:
    """Run one static policy inside the block, with a second look at inputs whose margin is below `margin`."""
    with override(state_of(gated), execution="static", static=frozenset(kept), margin=margin):
        yield


def within(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Prepared:
    """Calls of `model` inside a context."""

    def prepared(batch: Batch) -> Thunk:
        def run() -> Any:
            with context():
                return call(model, batch)

        return run

    return prepared


_ITSELF: Mapping[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "one pass": one_pass,
    "unhealed": unhealed,
}
"""The gated model, run without something."""
