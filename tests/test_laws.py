"""The laws: what holds for every network, whatever its architecture. Each is written so that it can fail.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from subjects import Subject, assert_close, assert_equal, differ, enliven, outputs, rows, subject
from torch import Tensor, nn

import surgery
from surgery.context import tape
from surgery.counting import flop_counter
from surgery.gates import iter_gates
from surgery.scripts.zoo import LAWS, call, find

# Routing is per token wherever that is allowed; these are also decided per sample, from pooled features.
PER_SAMPLE = ("timm/vit_pico", "timm/swin_pico", "transformers/bert", "transformers/distilbert", "transformers/llama")
NAMES = [*(entry.name for entry in LAWS), *(f"{name}@sample" for name in PER_SAMPLE)]
LAW = pytest.mark.parametrize("name", NAMES)
TEXTS = [n for n in NAMES if isinstance(x := find(n.partition("@")[0]).example(1), dict) and "attention_mask" in x]
EXECUTIONS = ("skip", "mask", "dense")


def fresh(one: Subject) -> nn.Module:
    """A gated copy of its own, for a test that changes it."""
    return enliven(surgery.insert_gates(one.model, one.plan))


def run(one: Subject, example: Any, mode: str, decisions: Any, **options: Any) -> list[Tensor]:
    """Outputs of the shared gated copy in one execution under forced decisions."""
    with surgery.execution(one.gated, mode), surgery.force(one.gated, decisions, **options):  # type: ignore[arg-type]
        return outputs(one.gated, example)


# -- 1. open gates change nothing, and nothing changes the original ---------------------------------------------------


@LAW
@pytest.mark.parametrize("mode", EXECUTIONS)
def test_open_gates_are_bit_equal(name: str, mode: str) -> None:
    one = subject(name)
    for samples in (1, 2, 3):
        example = one.entry.example(samples, seed=samples)
        assert_equal(run(one, example, mode, 1.0), outputs(one.model, example))


@LAW
def test_a_closed_gate_does_change_something(name: str) -> None:
    one = subject(name)
    assert differ(run(one, one.example, "skip", 0.0), outputs(one.model, one.example), 1e-3)


def portrait(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a conversion must leave alone."""
    state = model.state_dict(keep_vars=True)
    modules = list(model.named_modules())
    return {
        "tensors": {k: (id(v), v.dtype, v.data_ptr(), v.clone()) for k, v in state.items()},
        "requires_grad": {k: v.requires_grad for k, v in model.named_parameters()},
        "modules": {k: (id(m), type(m), m.training, sorted(m.__dict__)) for k, m in modules},
        "hooks": {k: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for k, m in modules},
    }


def assert_portrait(model: nn.Module, before: dict[str, Any]) -> None:
    after = portrait(model)
    for key in ("requires_grad", "modules", "hooks"):
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for key, (identity, dtype, pointer, value) in before["tensors"].items():
        assert after["tensors"][key][:3] == (identity, dtype, pointer), key
        assert torch.equal(after["tensors"][key][3], value), key


@LAW
def test_original_is_untouched(name: str) -> None:
    model, example = subject(name).entry.build()
    model.requires_grad_(True)
    next(iter(model.parameters())).requires_grad_(False)  # a mixture must stay a mixture
    dense = outputs(model, example)
    list(model.modules())[-1].train()
    before = portrait(model)
    gated = surgery.insert_gates(model, surgery.find_sites(model, example))
    assert_portrait(model, before)
    with surgery.force(gated, 0.5):
        outputs(gated, example)
    for parameter in gated.parameters():
        parameter.requires_grad_(True)
    gated.train()
    gated.load_state_dict({k: torch.zeros_like(v) for k, v in gated.state_dict().items()})
    assert_portrait(model, before)
    again = surgery.insert_gates(model, surgery.find_sites(model, example))
    again.train()
    again.half()
    again.to(torch.float64)
    assert_portrait(model, before)
    assert_equal(outputs(model.eval(), example), dense)


@LAW
def test_storage_is_shared(name: str) -> None:
    one = subject(name)
    gated = dict(one.gated.named_parameters(remove_duplicate=False)) | dict(
        one.gated.named_buffers(remove_duplicate=False)
    )
    mine = dict(one.model.named_parameters(remove_duplicate=False)) | dict(
        one.model.named_buffers(remove_duplicate=False)
    )
    for key, tensor in mine.items():
        assert gated[key] is not tensor, key
        assert gated[key].data_ptr() == tensor.data_ptr(), key
    groups: dict[int, set[str]] = {}  # ties are kept: names of one parameter there are names of one parameter here
    for key, tensor in mine.items():
        groups.setdefault(id(tensor), set()).add(key)
    for names in groups.values():
        assert len({id(gated[key]) for key in names}) == 1, names


# -- 2. closed gates run nothing -------------------------------------------------------------------------------------


@LAW
def test_closed_gates_run_no_module(name: str) -> None:
    one = subject(name)
    gated = fresh(one)
    counts: dict[str, int] = {}

    def count(target: str) -> Any:
        def hook(*_: Any) -> None:
            counts[target] = counts.get(target, 0) + 1

        return hook

    # where a layer keeps keys and values for later tokens, they are made whatever is decided (see the next law)
    skipped = [site for site in one.sites if not keeps_keys(site)]
    targets = {module for site in skipped for module in site.modules}
    targets = {t for t in targets if list(gated.get_submodule(t).parameters())}  # a dropout may be used elsewhere too
    targets -= {module for site in one.sites if keeps_keys(site) for module in site.modules}
    assert targets
    for target in targets:
        gated.get_submodule(target).register_forward_hook(count(target))
    with surgery.execution(gated, "skip"):
        with surgery.force(gated, 0.0):
            outputs(gated, one.example)
        assert counts == {}
        with surgery.force(gated, 1.0):
            outputs(gated, one.example)
    assert set(counts) == targets  # the hooks do see what runs


def replace_skip_paths(plan: surgery.Plan) -> surgery.Plan:
    return replace(plan, sites=tuple(replace(planned, skip="identity") for planned in plan.sites))


def keeps_keys(site: surgery.Site) -> bool:
    return "sample" not in site.granularities and site.query is not None


@LAW
def test_closed_gates_save_what_the_sites_say(name: str) -> None:
    """In FLOPs as torch counts them: all of a branch, or its query side where keys and values are kept."""
    one = subject(name)
    gated = surgery.insert_gates(one.model, replace_skip_paths(one.plan))
    counted = {}
    for rate in (0.0, 1.0):
        with surgery.execution(gated, "skip"), surgery.force(gated, rate), flop_counter() as counter:
            outputs(gated, one.example)
        counted[rate] = counter.get_total_flops()
    with flop_counter() as counter:
        outputs(one.model, one.example)
    assert counted[1.0] == counter.get_total_flops() == 2 * one.sites.model_flops
    saved = sum(site.query.flops if keeps_keys(site) and site.query else site.flops for site in one.sites)
    assert counted[1.0] - counted[0.0] == 2 * saved  # two samples


# -- 3. executions agree; a sample does not see its batch ------------------------------------------------------------


@LAW
@pytest.mark.parametrize("samples", [1, 3])
def test_skip_is_mask(name: str, samples: int) -> None:
    one = subject(name)
    example = one.entry.example(samples, seed=7)
    for seed in range(3):
        skip, mask = (run(one, example, mode, 0.5, seed=seed) for mode in ("skip", "mask"))
        assert_close(skip, mask)


@LAW
def test_executions_agree_on_single_sites(name: str) -> None:
    one = subject(name)
    example = one.entry.example(3, seed=7)
    for site in one.sites.names:
        decisions = dict.fromkeys(one.sites.names, True) | {site: torch.tensor([True, False, True])}
        skip, mask = (run(one, example, mode, decisions) for mode in ("skip", "mask"))
        assert_close(skip, mask)


@LAW
def test_sample_does_not_see_its_batch(name: str) -> None:
    one = subject(name)
    example = one.entry.example(3, seed=5)
    together = run(one, example, "skip", 0.5, seed=3, samples=[0, 1, 2])
    order = [2, 0, 1]
    shuffled = run(one, rows(example, order), "skip", 0.5, seed=3, samples=order)
    assert_close(shuffled, [t[order] if t.shape[:1] == (3,) else t for t in together])
    for index in range(3):
        alone = run(one, rows(example, [index]), "skip", 0.5, seed=3, samples=[index])
        assert_close(alone, [t[index : index + 1] if t.shape[:1] == (3,) else t for t in together])


@LAW
def test_static_is_mask_with_equal_decisions(name: str) -> None:
    one = subject(name)
    gated = fresh(one)
    policy = {site: index % 2 == 0 for index, site in enumerate(one.sites.names)}
    gated._surgery_state.static.update(policy)  # type: ignore[union-attr, operator]
    with surgery.execution(gated, "static"):
        static = outputs(gated, one.example)
    with surgery.execution(gated, "mask"), surgery.force(gated, policy):
        assert_close(static, outputs(gated, one.example))


# -- live routers ----------------------------------------------------------------------------------------------------


def decisions_of(one: Subject, example: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Decisions and scores of every site with live routers, in the execution `skip`."""
    with surgery.execution(one.gated, "skip"), tape(one.gated) as events:
        outputs(one.gated, example)
    return {event.site: (event.decisions, event.scores) for event in events}  # type: ignore[misc]


@LAW
def test_live_routers_decide_differently_per_input(name: str) -> None:
    one = subject(name)
    assert any(planned.granularity == "sample" for planned in one.plan.sites) or "@" not in name
    found = decisions_of(one, one.entry.example(8, seed=1))
    assert set(found) == set(one.sites.names)
    active = torch.cat([d.flatten() for d, _ in found.values()]).float().mean()
    assert 0.02 < active < 0.98


@LAW
def test_live_decisions_do_not_see_the_batch(name: str) -> None:
    one = subject(name)
    example = one.entry.example(3, seed=2)
    together = decisions_of(one, example)
    for index in range(3):
        alone = decisions_of(one, rows(example, [index]))
        for site, (decisions, scores) in alone.items():
            assert_same_decisions(site, (decisions[0], scores[0]), [value[index] for value in together[site]])


@pytest.mark.parametrize("name", TEXTS)
def test_decisions_do_not_see_padding(name: str) -> None:
    one = subject(name)
    example = one.entry.example(3, seed=2)
    assert isinstance(example, dict)
    mask = example["attention_mask"]
    assert not mask.bool().all()
    longer = dict(example)
    for key in ("input_ids", "attention_mask"):
        longer[key] = torch.cat((example[key], torch.zeros_like(example[key][:, :4])), 1)
    short, long = decisions_of(one, example), decisions_of(one, longer)
    for site, found in short.items():
        if found[0].shape[1:] == mask.shape[1:]:
            real = mask.bool()
            kept = [value[:, : mask.shape[1]][real] for value in long[site]]
            assert_same_decisions(site, [value[real] for value in found], kept)
        else:
            assert_same_decisions(site, found, long[site])


@pytest.mark.parametrize("name", TEXTS)
def test_forced_draws_do_not_see_padding(name: str) -> None:
    one = subject(name)
    example = one.entry.example(2, seed=2)
    assert isinstance(example, dict)
    mask = example["attention_mask"]
    left = dict(example)  # the same texts with padding on the left
    for key in ("input_ids", "attention_mask"):
        left[key] = torch.stack([row.roll(int((1 - m).sum())) for row, m in zip(example[key], mask, strict=True)])
    found = []
    for inputs in (example, left):
        with surgery.force(one.gated, 0.5, seed=4), tape(one.gated) as events:
            outputs(one.gated, inputs)
        found.append(events)
    for right, moved in zip(*found, strict=True):
        if right.decisions.shape == mask.shape:
            for row in range(2):
                a, b = right.decisions[row][mask[row].bool()], moved.decisions[row][left["attention_mask"][row].bool()]
                assert torch.equal(a, b), right.site
        else:
            assert torch.equal(right.decisions, moved.decisions), right.site


def assert_same_decisions(site: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Decisions and scores: scores agree within 1e-4, decisions unless the score is that close to the threshold (0)."""
    assert torch.allclose(actual[1], expected[1], rtol=1e-4, atol=1e-4), site
    flipped = actual[0] != expected[0]
    assert not (flipped & (actual[1].abs() > 1e-4)).any(), site


# -- 6. what commutes ------------------------------------------------------------------------------------------------


@LAW
def test_deepcopy_is_equal_and_independent(name: str) -> None:
    one = subject(name)
    gated = fresh(one)
    twin = copy.deepcopy(gated)
    for mode in ("skip", "mask"):
        with surgery.execution(gated, mode), surgery.execution(twin, mode):  # type: ignore[arg-type]
            before = outputs(gated, one.example)
            assert_equal(outputs(twin, one.example), before)
    with surgery.force(gated, 0.0):  # forcing one does not force the other
        with surgery.execution(twin, "mask"):
            assert_equal(outputs(twin, one.example), before)
    for _, gate in iter_gates(twin):
        for parameter in gate.parameters():
            parameter.data.zero_()
    with surgery.execution(gated, "mask"):
        assert_equal(outputs(gated, one.example), before)


@LAW
def test_training_mode_stops_at_the_gates(name: str) -> None:
    one = subject(name)
    gated = fresh(one)
    with surgery.execution(gated, "mask"):
        before = outputs(gated, one.example)
        gated.train()
        assert all(gate.training for _, gate in iter_gates(gated))
        for module in gated.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                assert not module.training
        statistics = {k: v.clone() for k, v in one.model.named_buffers()}
        outputs(gated, one.example)
        assert all(torch.equal(v, statistics[k]) for k, v in one.model.named_buffers())
        gated.eval()
        assert not any(module.training for module in gated.modules())
        assert_equal(outputs(gated, one.example), before)


@LAW
def test_state_dict_round_trip(name: str) -> None:
    one = subject(name)
    first, second = fresh(one), enliven(surgery.insert_gates(one.model, one.plan), seed=1)
    with surgery.execution(first, "mask"), surgery.execution(second, "mask"):
        expected = outputs(first, one.example)
        assert differ(outputs(second, one.example), expected)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        assert_equal(outputs(second, one.example), expected)


@LAW
def test_state_dict_keeps_backbone_names(name: str) -> None:
    one = subject(name)
    mine, gated = one.model.state_dict(), one.gated.state_dict()
    assert [k for k in gated if "surgery_gates" not in k] == list(mine)
    assert any("surgery_gates" in k for k in gated)


@LAW
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_routers_stay_float32(name: str, dtype: torch.dtype) -> None:
    one = subject(name)
    gated = fresh(one).to(dtype)
    backbone = [p for k, p in gated.named_parameters() if "surgery_gates" not in k]
    assert {p.dtype for p in backbone if p.is_floating_point()} == {dtype}
    assert {p.dtype for _, gate in iter_gates(gated) for p in gate.router.parameters()} == {torch.float32}
    dense = copy.deepcopy(one.model).to(dtype)
    example = cast(one.example, dtype)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, example), outputs(dense, example))
    with surgery.execution(gated, "skip"):
        skip = outputs(gated, example)
    assert [t.dtype for t in skip] == [t.dtype for t in outputs(dense, example)]
    if dtype is torch.float64:
        with surgery.execution(gated, "mask"):
            assert_close(skip, outputs(gated, example), 1e-6)


def cast(example: Any, dtype: torch.dtype) -> Any:
    if isinstance(example, Tensor):
        return example.to(dtype) if example.is_floating_point() else example
    return {key: cast(value, dtype) for key, value in example.items()}


@LAW
def test_remove_gives_the_dense_model_back(name: str) -> None:
    one = subject(name)
    gated = fresh(one)
    dense = surgery.remove(gated)
    assert type(dense) is type(one.model)
    assert list(dense.state_dict()) == list(one.model.state_dict())
    assert [type(m) for m in dense.modules()] == [type(m) for m in one.model.modules()]
    assert_equal(outputs(dense, one.example), outputs(one.model, one.example))
    assert not any(p.requires_grad for p in dense.parameters())  # as the zoo's are
    again = surgery.insert_gates(dense, one.sites)  # and it can be converted once more
    with surgery.force(again, 1.0):
        assert_equal(outputs(again, one.example), outputs(one.model, one.example))


@LAW
def test_class_stays(name: str) -> None:
    one = subject(name)
    assert isinstance(one.gated, type(one.model))
    assert type(one.gated).__name__ == type(one.model).__name__
    assert type(one.gated).__module__ == type(one.model).__module__
    originals = dict(one.model.named_modules())
    for key, module in one.gated.named_modules():
        if key in originals:
            assert isinstance(module, type(originals[key])), key
            assert type(module).__name__ == type(originals[key]).__name__, key


@LAW
def test_program_can_be_shown(name: str) -> None:
    one = subject(name)
    for site in one.sites:
        text = surgery.show(one.gated, site.host)
        assert "surgery_gates" in text and "def " in text


# -- 7. gradients ----------------------------------------------------------------------------------------------------


@LAW
def test_gradients_reach_skip_paths_only(name: str) -> None:
    one = subject(name)
    gated = fresh(one).train()
    with surgery.execution(gated, "mask"), surgery.force(gated, 0.0):
        result = call(gated, one.example)
    next(t for t in surgery.calling.tensors(result) if t.requires_grad).float().square().sum().backward()
    for key, parameter in gated.named_parameters():
        if "surgery_gates" not in key:
            assert not parameter.requires_grad and parameter.grad is None, key
    reached = [
        site
        for site, gate in iter_gates(gated)
        if any(p.grad is not None and p.grad.abs().sum() > 0 for p in gate.skip_path.parameters())
    ]
    translates = isinstance(one.example, dict) and "decoder_input_ids" in one.example
    cut_off = "encoder" if translates else None  # with cross-attention closed as well
    learn = [site for site, gate in iter_gates(gated) if list(gate.skip_path.parameters())]
    assert reached == [site for site in learn if cut_off not in site.split(".")]
