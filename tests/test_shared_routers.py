"""An MLP's router that reads what the router of its layer's attention made of the stream before attention."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import assert_close, assert_equal, enliven, outputs, rows, with_skip_paths
from torch import Tensor, nn
from toys import assert_same, frozen

import surgery
from surgery.calling import Batch
from surgery.context import Shared, handled, scope, state_of
from surgery.costs import costs_of
from surgery.errors import CheckpointError, PlanMismatch, SurgeryError
from surgery.gates import Gate, iter_gates
from surgery.harm import label_harm
from surgery.regression import regress_routers
from surgery.routers import FollowingRouter
from surgery.scripts.zoo import find
from surgery.straight_through import SoftGates, router_gradients

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 31, 32, 33, 34]])
PADDED = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
NAMES = [
    *("timm/vit_pico", "timm/vit_pico@sample", "transformers/bert", "transformers/bert@sample", "transformers/llama"),
    *("plain/encoder", "transformers/gpt_neox"),
]
"""Pre-norm and post-norm, per token and per sample, padded, parallel branches, sums in nested modules (BERT)."""
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@dataclasses.dataclass(frozen=True)
class Built:
    """A network, its gated copy whose routers are shared and random, and an example."""

    model: nn.Module
    gated: nn.Module
    example: Any

    @property
    def gates(self) -> dict[str, Gate]:
        return dict(iter_gates(self.gated))

    @property
    def followers(self) -> dict[str, str]:
        """Leader by follower."""
        return {p.site.name: p.leader for p in state_of(self.gated).plan.sites if p.leader}


def build(name: str) -> Built:
    name, _, granularity = name.partition("@")
    model, example = find(name).build()
    plan = surgery.find_sites(model, example).plan(granularity=granularity or "auto", routers="shared")  # type: ignore[arg-type]
    built = Built(model, enliven(surgery.insert_gates(model, with_skip_paths(plan))), example)
    state_of(built.gated).budget = 0.5
    assert built.followers
    return built


def llama(**plan: Any) -> Built:
    """A decoder in float64 whose untrained routers close about half of what they are asked for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 100, "pad_token_id": 0}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = model.double()
    gated = surgery.insert_gates(model, surgery.find_sites(model, PADDED).plan(routers="shared", **plan))
    for _, gate in iter_gates(gated):
        nn.init.normal_(gate.router.up.weight, std=1.0)
    state = state_of(gated)
    state.budget, state.threshold = 0.5, 0.0
    return Built(model, gated, PADDED)


@pytest.fixture(scope="module")
def decoder() -> Built:
    return llama()


def scores_of(built: Built, example: Any = None) -> dict[str, Tensor | None]:
    with torch.no_grad(), surgery.tape(built.gated) as events:
        outputs(built.gated, built.example if example is None else example)
    return {event.site: event.scores for event in events}


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_an_mlp_follows_the_attention_of_its_layer(decoder: Built) -> None:
    assert decoder.followers == {f"model.layers.{i}.mlp": f"model.layers.{i}.self_attn" for i in range(3)}
    for name in decoder.followers:
        router = decoder.gates[name].router
        assert isinstance(router, FollowingRouter)
        assert {key: tuple(p.shape) for key, p in router.named_parameters()} == {
            "up.weight": (1, decoder.gates[name].planned.hidden),
            "up.bias": (1,),
        }


@pytest.mark.parametrize(
    ("name", "kinds", "plan"),
    [
        ("transformers/llama", ("attention", "mlp"), {"routers": "own"}),
        ("transformers/llama", ("mlp",), {"routers": "shared"}),
        ("transformers/llama", ("heads", "mlp"), {"routers": "shared"}),
        ("transformers/llama", ("attention", "mlp"), {"routers": "shared", "first_layers": 9}),
        ("transformers/t5", ("attention", "mlp"), {"routers": "shared"}),  # every branch has a module of its own
    ],
    ids=["own", "mlp", "heads", "always on", "t5"],
)
def test_others_keep_their_own(name: str, kinds: tuple[Any, ...], plan: dict[str, Any]) -> None:
    model, example = find(name).build()
    planned = surgery.find_sites(model, example).filter(kind=kinds).plan(**plan)
    assert {one.leader for one in planned.sites} == {""} and {one.site.kind for one in planned.sites} == set(kinds)


def test_a_follower_costs_its_row(decoder: Built) -> None:
    costs, gate = state_of(decoder.gated).costs.sites, decoder.gates[MLP]
    hidden, tokens = gate.planned.hidden, gate.site.positions
    assert costs[MLP].router == 2 * tokens * hidden
    assert costs[ATTENTION].router == 2 * tokens * hidden * (32 + 1)


def test_shared_routers_may_be_wider() -> None:
    """They are as wide as their cost allows, all together."""
    model, example = find("timm/vit_pico").build()
    sites = surgery.find_sites(model, example)
    own, shared = (sites.plan(granularity="sample", routers=kind) for kind in ("own", "shared"))
    assert own.sites[0].hidden <= shared.sites[0].hidden
    assert len({one.hidden for one in shared.sites}) == 1


def test_unknown_kinds_are_refused(decoder: Built) -> None:
    with pytest.raises(SurgeryError, match="routers must be one of own, shared; got 'common'"):
        surgery.find_sites(decoder.model, PADDED).plan(routers="common")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("site", "change"),
    [
        (MLP, {"leader": "model.layers.7.self_attn"}),
        (MLP, {"leader": "model.layers.1.self_attn"}),
        ("model.layers.1.mlp", {"leader": ATTENTION}),
        (MLP, {"leader": MLP}),
        (ATTENTION, {"leader": MLP}),
        (ATTENTION, {"always_on": True}),
        (ATTENTION, {"granularity": "prefill"}),
        (ATTENTION, {"hidden": 4}),
    ],
    ids=["unknown", "later", "elsewhere", "itself", "backwards", "always on", "granularity", "width"],
)
def test_leaders_that_cannot_lead_are_refused(
    decoder: Built, tmp_path: Path, site: str, change: dict[str, Any]
) -> None:
    plan = state_of(decoder.gated).plan
    changed = tuple(dataclasses.replace(p, **change) if p.site.name == site else p for p in plan.sites)
    with pytest.raises(PlanMismatch, match=r"its router cannot share that of 'model\."):
        dataclasses.replace(plan, sites=changed)
    surgery.save(decoder.gated, tmp_path / "out")
    file = tmp_path / "out" / "surgery_config.json"
    config = json.loads(file.read_text())
    (entry,) = (one for one in config["plan"]["sites"] if one["site"]["name"] == site)
    entry.update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"its router cannot share that of 'model\."):
        surgery.load(tmp_path / "out", model=decoder.model)


# -- executing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_open_gates_change_nothing(name: str) -> None:
    built = build(name)
    state_of(built.gated).threshold = float("-inf")
    expected = outputs(built.model, built.example)
    for mode in ("skip", "mask", "cond"):
        with surgery.execution(built.gated, mode):  # type: ignore[arg-type]
            assert_equal(outputs(built.gated, built.example), expected)
    with surgery.force(built.gated, 1.0):
        assert_equal(outputs(built.gated, built.example), expected)


@pytest.mark.parametrize("name", NAMES)
def test_skip_is_mask(name: str) -> None:
    built = build(name)
    with surgery.tape(built.gated) as events, surgery.execution(built.gated, "mask"):
        expected = outputs(built.gated, built.example)
    followed = [event.rate() for event in events if event.site in built.followers]
    assert min(followed) < 1 and max(followed) > 0
    for mode in ("skip", "cond"):
        with surgery.execution(built.gated, mode):  # type: ignore[arg-type]
            assert_close(outputs(built.gated, built.example), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_follower_scores_what_its_leader_saw(name: str) -> None:
    """Of the same call, whatever the branch between them does to the stream."""
    built = build(name)
    seen: dict[str, Tensor] = {}

    def handler(gate: Gate, branch: Any, left: Tensor | None, residual: Tensor, inputs: Any) -> Any:
        leader = built.followers.get(gate.site.name)
        if leader is not None:
            router = built.gates[leader].router
            expected = gate.router(router(seen[leader], gate.padding(residual), hidden=True))
            torch.testing.assert_close(gate.scores(residual), expected - gate.offset)
            seen[gate.site.name] = expected
        else:
            seen[gate.site.name] = residual.clone()
            if len(seen) % 3:  # or the follower has to compute it
                gate.scores(residual)
        return gate.closed(branch, left, residual) if gate.leaves_out(branch) else gate.open(branch, left, inputs)

    with torch.no_grad(), handled(built.gated, handler):
        outputs(built.gated, built.example)
    assert set(built.followers) <= set(seen)


@pytest.mark.parametrize("name", ["transformers/bert@sample", "transformers/llama", "timm/vit_pico"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    built = build(name)
    together = scores_of(built)
    for index in range(2):
        alone = scores_of(built, rows(built.example, [index]))
        for site in built.followers:
            found, expected = alone[site], together[site]
            assert found is not None and expected is not None
            torch.testing.assert_close(found[0], expected[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [True, False, "rows"])
def test_a_leader_is_forced_and_its_follower_is_not(decoder: Built, value: Any) -> None:
    free = scores_of(decoder)
    forced = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.5 if value == "rows" else value
    with surgery.force(decoder.gated, {ATTENTION: forced}):
        found = scores_of(decoder)
    assert found[ATTENTION] is None
    assert torch.equal(found[MLP], free[MLP])  # type: ignore[arg-type]


def test_a_follower_is_forced_and_its_leader_is_not(decoder: Built) -> None:
    free = scores_of(decoder)
    with surgery.force(decoder.gated, {MLP: False}):
        found = scores_of(decoder)
    assert found[MLP] is None
    assert torch.equal(found[ATTENTION], free[ATTENTION])  # type: ignore[arg-type]


def test_a_router_that_others_read_counts_where_its_own_site_is_forced(decoder: Built) -> None:
    state, name = state_of(decoder.gated), "model.layers.1.mlp"
    others = {n: True for n in state.names if n != name}
    with torch.no_grad(), surgery.force(decoder.gated, others), surgery.tape(decoder.gated) as events:
        outputs(decoder.gated, PADDED)
    costs, leader = state.costs, decoder.followers[name]
    rates = torch.stack([event.rates() for event in events if event.site == name])[0].double()
    site = costs.sites[name]
    routers = site.router + costs.sites[leader].router
    expected = (costs.dense + routers - (1 - rates) * (site.branch - site.skip)) / costs.dense
    torch.testing.assert_close(costs_of(events, costs, len(IDS)), expected)


def test_what_is_shared_ends_with_its_module(decoder: Built) -> None:
    kept: list[dict[str, Shared]] = []

    def look(*_: Any) -> None:
        running = scope()
        assert running is not None
        kept.append(dict(running.shared))

    norm = decoder.gated.model.norm  # type: ignore[union-attr]
    handle = norm.register_forward_hook(look)
    outputs(decoder.gated, PADDED)
    handle.remove()
    assert kept == [{}]


def test_a_module_called_by_itself(decoder: Built) -> None:
    layer: Any = decoder.gated.model.layers[0]  # type: ignore[union-attr,index]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    positions = decoder.model.model.rotary_emb(x, torch.arange(5)[None])  # type: ignore[union-attr]
    found = []
    for mode in ("skip", "mask"):
        with torch.no_grad(), surgery.execution(decoder.gated, mode), surgery.tape(decoder.gated) as events:  # type: ignore[arg-type]
            found.append(layer(x, position_embeddings=positions, attention_mask=None))
        assert [event.site for event in events] == [ATTENTION, MLP]
    torch.testing.assert_close(found[0], found[1])


class Either(nn.Module):
    """Attention is added to the stream, or takes its place."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, instead: Tensor | None = None) -> Tensor:
        made = self.attn(x, x, x, need_weights=False)[0]
        x = x + made if instead is None else made + instead
        return x + self.mlp(x)


def test_a_follower_runs_where_its_leader_is_not_called() -> None:
    model = nn.Sequential(Either()).eval()
    x = torch.randn(2, 5, 8)
    plan = surgery.find_sites(model, x).plan(routers="shared")
    assert [one.leader for one in plan.sites] == ["", "0.attn"]
    gated = surgery.insert_gates(model, plan)
    state_of(gated).budget, state_of(gated).threshold = 0.5, float("inf")
    with torch.no_grad():
        assert not torch.equal(gated(x), model(x))
        other = torch.randn(2, 5, 8)
        assert torch.equal(gated[0](x, other), model[0](x, other))  # type: ignore[index]


# -- texts that are written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["token", "prefill"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_cache_changes_nothing(granularity: Any, options: dict[str, Any]) -> None:
    gated: Any = llama(granularity=granularity).gated
    found = []
    for cache in (True, False):
        more = options if cache else {key: value for key, value in options.items() if key == "num_beams"}
        with torch.no_grad(), surgery.tape(gated) as events:
            found.append(
                gated.generate(**PADDED, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=cache, **more)
            )
        rates = {event.rate() for event in events if event.site in (ATTENTION, MLP)}
        assert min(rates) < 1 and max(rates) > 0
    assert torch.equal(*found)


def test_a_closed_leader_at_decode_still_leads(decoder: Built) -> None:
    """One token after others: the follower's scores are those of the whole text."""
    ids = IDS[:1]
    decisions = {name: torch.zeros(1, 7, dtype=torch.bool) for name in decoder.followers.values()}
    with surgery.force(decoder.gated, decisions):
        whole = scores_of(decoder, {"input_ids": ids})[MLP]
    cache = transformers.DynamicCache(config=decoder.gated.config)
    parts = []
    for index in range(7):
        with surgery.force(decoder.gated, dict.fromkeys(decisions, False)):
            step = {"input_ids": ids[:, index : index + 1], "past_key_values": cache, "use_cache": True}
            parts.append(scores_of(decoder, step)[MLP])
    torch.testing.assert_close(torch.cat(parts, 1), whole)  # type: ignore[arg-type]


# -- learning ---------------------------------------------------------------------------------------------------------


class Selective(nn.Module):
    """Adds the more, the larger one channel is, to the last two of sixteen."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(16, 1), nn.Linear(16, 16)
        with torch.no_grad():
            self.gate.weight.copy_(2 * torch.eye(16)[channel : channel + 1])
            self.gate.bias.zero_()
            self.value.weight.zero_()
            self.value.bias.copy_(torch.tensor([0.0] * 14 + [1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).exp() * self.value(x)


class Layer(nn.Module):
    """What attention is worth is told by the first channel, what the MLP is worth by the second."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.attn, self.mlp, self.head, self.pool = Selective(0), Selective(1), nn.Linear(16, 2), pool

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = x + self.mlp(x)
        return self.head(x.mean(1) if self.pool else x)


@pytest.mark.parametrize("shape", [(16,), (5, 16)], ids=["per sample", "per token"])
def test_one_bottleneck_learns_both_labels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    data = [torch.randn(128, *shape) for _ in range(6)]
    model = Layer(pool=len(shape) > 1).eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, data[0]).plan(skip="affine", routers="shared"))
    built = Built(model, gated, torch.randn(200, *shape))
    assert built.followers == {"mlp": "attn"}
    found = regress_routers(gated, data)
    assert list(found) == ["attn", "mlp"]
    assert all(one.correlation > 0.8 and one.shrinkage > 0.7 for one in found.values())
    state_of(gated).budget, state_of(gated).threshold = 0.5, float("-inf")
    scores, labels = scores_of(built), label_harm(gated, Batch((built.example,)))
    for site, gate in built.gates.items():
        score = scores[site] + gate.offset  # type: ignore[operator]
        for other, label in labels.items():
            pair = torch.stack((score.flatten(), label.harm.clamp_min(1e-6).log().flatten()))
            correlation = float(torch.corrcoef(pair)[0, 1])
            assert correlation > 0.8 if other == site else abs(correlation) < 0.3
            if other == site:
                assert float(pair[0].mean()) == pytest.approx(float(pair[1].mean()), abs=0.3)  # units of log harm


def test_few_rows_are_one_score() -> None:
    built = build("timm/vit_pico@sample")
    found = regress_routers(built.gated, [built.example[:2]])
    assert {one.shrinkage for one in found.values()} == {0.0}
    scores = scores_of(built, torch.randn_like(built.example))
    assert all(float(scores[site].std()) < 1e-5 for site in built.gates)  # type: ignore[union-attr]


def test_gradients_reach_the_bottleneck_from_both(decoder: Built) -> None:
    soft = SoftGates(3, torch.arange(3), 0.0, 0.0, 0)
    with torch.enable_grad(), handled(decoder.gated, soft):
        outputs_with_grad(decoder.gated)
    leader, follower = (decoder.gates[name].router for name in (ATTENTION, MLP))
    wanted = [leader.down.weight, leader.up.weight, follower.up.weight]  # type: ignore[list-item,union-attr]

    def reached(site: str) -> list[bool]:
        upstream = [torch.full_like(d.leaf, d.gate.site.name == site) for d in soft.decided]
        return [bool(g.abs().sum() > 0) for g in router_gradients(soft.decided, upstream, wanted)]  # type: ignore[arg-type]

    assert reached(ATTENTION) == [True, True, False]
    assert reached(MLP) == [True, False, True]


def outputs_with_grad(gated: nn.Module) -> Any:
    return gated(**PADDED)


def test_conversion_changes_routers_and_skip_paths_alone() -> None:
    model, example = find("timm/vit_pico").build()
    before = frozen(model)
    data = [torch.randn(8, *example.shape[1:]) for _ in range(10)]  # type: ignore[union-attr]
    gated = surgery.convert(model, 0.7, data=data, routers="shared", options=surgery.Options(steps=4), tune="train")
    state = state_of(gated)
    state.policy = "routed"
    followers = [p for p in state.plan.sites if p.leader]
    assert followers
    assert_same(frozen(model), before)
    assert_same(frozen(gated), before)
    report = surgery.measure(gated, data[4::5], dense=model, speed=())
    assert report.cost == pytest.approx(0.7, abs=0.02)
    text = str(surgery.status(gated))
    assert all(text.count(p.leader) == 2 for p in followers)  # its own row, and its follower's
    assert {row["router"] for row in surgery.status(gated).to_dict()["sites"]} == {
        "own",
        *(p.leader for p in followers),
    }


def test_training_changes_both_rows_and_the_bottleneck() -> None:
    model, example = find("timm/vit_pico").build()
    data = [torch.randn(8, *example.shape[1:]) for _ in range(4)]  # type: ignore[union-attr]
    built = Built(model, surgery.insert_gates(model, surgery.find_sites(model, example).plan(routers="shared")), data)
    enliven(built.gated)
    before = {name: p.detach().clone() for name, p in built.gated.named_parameters()}
    surgery.train_routers(built.gated, data, budget=0.7, options=surgery.Options(steps=3, router_rate=1e-2))
    changed = {name for name, p in built.gated.named_parameters() if not torch.equal(p, before[name])}
    expected = {
        f"{name}.{key}"
        for name, module in built.gated.named_modules()
        if isinstance(module, Gate)
        for key, _ in module.named_parameters()
        if key.startswith("router")
    }
    assert changed == expected and any(name.endswith("down.weight") for name in expected)


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_a_round_trip_gives_equal_scores(decoder: Built, tmp_path: Path) -> None:
    surgery.save(decoder.gated, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "surgery_config.json").read_text())
    assert {one["site"]["name"]: one["leader"] for one in saved["plan"]["sites"] if one["leader"]} == decoder.followers
    again = surgery.load(tmp_path / "out", model=decoder.model)
    loaded = Built(decoder.model, again, PADDED)
    for found, expected in zip(scores_of(loaded).values(), scores_of(decoder).values(), strict=True):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    assert_equal(outputs(again, PADDED), outputs(decoder.gated, PADDED))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_half_precision_all_routers_stay_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    built = build("transformers/bert")
    surgery.save(built.gated, tmp_path / "whole", base=True)
    surgery.save(built.gated, tmp_path / "native", native=True)
    for loaded in (
        surgery.load(tmp_path / "whole", dtype=dtype),
        type(built.model).from_pretrained(tmp_path / "native", dtype=dtype),  # type: ignore[attr-defined]
    ):
        routers = [gate.router for _, gate in iter_gates(loaded)]
        assert any(isinstance(router, FollowingRouter) for router in routers)
        assert {p.dtype for router in routers for p in router.parameters()} == {torch.float32}
        with torch.no_grad():
            assert outputs(loaded, built.example)[0].dtype is dtype


def test_copies_share_their_own_router(decoder: Built) -> None:
    twin = copy.deepcopy(decoder.gated)
    gates = dict(iter_gates(twin))
    assert gates[MLP].leader == (gates[ATTENTION],) and gates[ATTENTION] is not decoder.gates[ATTENTION]
    assert len(list(twin.parameters())) == len(list(decoder.gated.parameters()))
    half = twin.half()
    assert {p.dtype for _, gate in iter_gates(half) for p in gate.router.parameters()} == {torch.float32}
    with torch.no_grad():
        assert half(**PADDED).logits.dtype is torch.float16


def test_removed_is_dense(decoder: Built) -> None:
    dense = surgery.remove(decoder.gated)
    assert not any(isinstance(module, (Gate, FollowingRouter)) for module in dense.modules())
    assert_equal(outputs(dense, PADDED), outputs(decoder.model, PADDED))


def test_a_log_is_replayed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="logs are Arrow files")
    built = build("transformers/bert")
    forced = {next(iter(built.followers.values())): False}
    for index, decisions in enumerate(({}, forced)):
        with surgery.force(built.gated, decisions), surgery.record(built.gated, tmp_path / str(index)):
            outputs(built.gated, built.example)
        report = surgery.replay(built.gated, surgery.read_log(tmp_path / str(index)), [built.example])
        assert report.rows == report.equal == 2 and not report.differing


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["cond", "mask"])
@pytest.mark.parametrize("name", ["timm/vit_pico", "timm/vit_pico@sample"])
def test_pinned_and_exported(name: str, execution: Any, tmp_path: Path) -> None:
    built = build(name)
    example = rows(built.example, [0])
    with torch.no_grad(), surgery.execution(built.gated, "mask"):
        expected = built.gated(example)
    pinned = surgery.pin(built.gated, example, execution)
    with torch.no_grad():
        torch.testing.assert_close(pinned(example), expected)
        compiled = torch.compile(pinned, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(example), expected)
    surgery.export(built.gated, tmp_path / "model.pt2", example, execution=execution)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(example)[0], expected)
