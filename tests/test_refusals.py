"""What is refused: a named error that says what, where and what to do next, and nothing half-done."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import assert_equal, outputs, subject
from torch import nn
from toys import Residual, Stack, gate_all, mlp

import surgery
from surgery import errors
from surgery.overview import status


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_gated_model_is_not_converted_twice() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.AlreadyConverted, match="remove"):
        surgery.insert_gates(one.gated, one.sites)
    with pytest.raises(errors.AlreadyConverted, match="remove"):
        surgery.find_sites(one.gated, one.example)


def test_model_without_sites() -> None:
    model, x = Plain(), torch.randn(2, 8)
    sites = surgery.find_sites(model, x)
    assert len(sites) == 0
    with pytest.raises(errors.NoSites, match="Plain"):
        surgery.insert_gates(model, sites)


@pytest.mark.parametrize("value", [None, "timm:resnet18", lambda x: x])
def test_not_a_module(value: object) -> None:
    with pytest.raises(errors.UnsupportedModel, match=type(value).__name__):
        surgery.find_sites(value, torch.zeros(2, 3))  # type: ignore[arg-type]


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(errors.UnsupportedModel, match="meta"):
        surgery.find_sites(model, torch.zeros(2, 8))


def test_example_that_does_not_fit() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.SurgeryError, match=r"2, 3, 7, 7"):
        surgery.find_sites(one.model, torch.zeros(2, 3, 7, 7))


def test_plan_of_another_model() -> None:
    plan = subject("timm/mixer").sites.plan()
    with pytest.raises(errors.PlanMismatch, match="blocks"):
        surgery.insert_gates(subject("timm/test_resnet").model, plan)


def test_plan_survives_json() -> None:
    one = subject("transformers/bert")
    plan = one.sites.plan()
    again = surgery.Plan.from_dict(plan.to_dict())
    assert again.names == plan.names
    gated = surgery.insert_gates(one.model, again)
    with surgery.force(gated, 1.0):
        assert_equal(outputs(gated, one.example), outputs(one.model, one.example))


def test_granularity_that_probes_forbid() -> None:
    sites = subject("timm/test_resnet").sites
    per_sample = [site.name for site in sites if "token" not in site.granularities]
    assert per_sample
    plan = sites.plan(granularity="token")  # applies where allowed
    assert all(planned.granularity in planned.site.granularities for planned in plan.sites)


def test_gates_are_needed() -> None:
    model = Plain()
    for use in (surgery.remove, status, lambda m: surgery.force(m, 0.5).__enter__()):
        with pytest.raises(errors.NotConverted, match="Plain"):
            use(model)  # type: ignore[operator]


def test_forced_site_that_does_not_exist() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match=r"blocks\.7\.mlp"), surgery.force(one.gated, {"blocks.7.mlp": False}):
        pass


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_forced_rate_outside_its_range(rate: float) -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match=r"\[0, 1\]"), surgery.force(one.gated, rate):
        pass


def test_forced_decisions_of_the_wrong_shape() -> None:
    one = subject("timm/vit_pico")
    site = one.sites.names[0]
    with surgery.force(one.gated, {site: torch.ones(5, dtype=torch.bool)}):
        with pytest.raises(errors.ForceError, match=rf"(?s){site}.*\(5,\).*\(2"):
            outputs(one.gated, one.example)


@pytest.mark.parametrize("value", [torch.ones(2), 1, "open"])
def test_forced_decisions_of_the_wrong_type(value: object) -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match="bool"), surgery.force(one.gated, {one.sites.names[0]: value}):  # type: ignore[dict-item]
        pass


def test_unknown_execution() -> None:
    one = subject("timm/vit_pico")
    with pytest.raises(errors.ForceError, match="dense, mask, skip"), surgery.execution(one.gated, "fast"):  # type: ignore[arg-type]
        pass


def test_selection_that_leaves_nothing() -> None:
    with pytest.raises(errors.NoSites, match="blocks"):
        subject("timm/vit_pico").sites.filter("stages.*")


def test_kinds_and_names_that_are_near() -> None:
    sites = subject("timm/vit_pico").sites
    with pytest.raises(errors.NoSites, match=r"named blocks\.0\.mpl; found: .*did you mean blocks\.0\.mlp"):
        sites.filter("blocks.0.mpl")
    gated, forced = subject("timm/vit_pico").gated, {"blocks.0.mpl": False}
    with (
        pytest.raises(errors.ForceError, match=r"no site named blocks\.0\.mpl; did you mean blocks\.0\.mlp"),
        surgery.force(gated, forced),
    ):
        pass
    with pytest.raises(errors.NoSites, match="named atention;.*did you mean attention"):
        sites.filter("atention")
    with pytest.raises(errors.NoSites, match="of kind block and named .*; found: "):
        sites.filter("blocks.*", kind="block")


def test_unknown_site() -> None:
    one = subject("timm/vit_pico")
    for use in (lambda: one.sites["blocks.0.mpl"], lambda: surgery.show(one.gated, "blocks.0.mpl")):
        with pytest.raises(errors.UnknownSite, match=r"'blocks\.0\.mpl'.*did you mean blocks\.0\.mlp") as caught:
            use()
        assert isinstance(caught.value, KeyError) and not str(caught.value).startswith('"')


def residual() -> nn.Module:
    wide = [nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8)) for _ in range(2)]
    return nn.Sequential(*map(Residual, wide), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("number", [1, 4, 6])  # fitted on, and held out
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(16, 7), r"refuses .*float32 \[16, 7\]"),
        (torch.zeros(16, 8).index_fill(0, torch.tensor([3, 5]), torch.nan), "holds NaN or infinity in rows 3, 5"),
        (torch.zeros(0, 8), "no sample"),
        ("text", "must be a tensor.*got str"),
    ],
)
def test_a_wrong_batch_is_named_by_its_number(number: int, wrong: object, message: str) -> None:
    model = residual()
    data: list[object] = [torch.randn(16, 8) for _ in range(10)]
    gated = surgery.convert(model, 0.8, data=data, tune="oneshot")
    data[number] = wrong
    with pytest.raises(errors.DataError, match=f"batch {number} of the data: .*{message}"):
        surgery.convert(model, 0.8, data=data, tune="oneshot")
    for use in (surgery.measure, surgery.audit):
        with pytest.raises(errors.DataError, match=f"batch {number} of the data: .*{message}"):
            use(gated, data)


def test_a_dense_model_with_other_outputs() -> None:
    gated = surgery.convert(residual(), 0.8, data=[torch.randn(16, 8) for _ in range(5)], tune="oneshot")
    with pytest.raises(errors.BaseMismatch, match=r"Linear whose output has the shape \(16, 4\).*\(16, 3\)"):
        surgery.measure(gated, [torch.randn(16, 8)], dense=nn.Linear(8, 4), speed=())


def test_flags_of_gradients_come_back() -> None:
    model = residual()
    model[0].requires_grad_(False)
    gated = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(4, 8)))
    assert not any(p.requires_grad for name, p in gated.named_parameters() if "surgery_gates" not in name)
    dense = surgery.remove(gated)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in dense.named_parameters()} == flags and len(set(flags.values())) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": 0.5}, "budgets must be two fractions of dense"),
        ({"budgets": (0.5,)}, "budgets must be two fractions"),
        ({"budgets": ("low", "high")}, "budgets must be two fractions"),
        ({"temperature": "hot"}, "temperature must be a positive number, got 'hot'"),
        ({"noise": None}, "noise must be a number that is not negative, got None"),
        ({"router_rate": float("nan")}, "router_rate must be a number"),
        ({"mixed_precision": ["no"]}, "mixed_precision must be one of no, fp16"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.SurgeryError, match=rf"Options\.{message}"):
        surgery.Options(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": -3}, "hidden must be a whole number of at least 1, got -3"),
        ({"hidden": "wide"}, "hidden must be a whole number"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5, "skip": "low-rank"}, "rank must be a whole number"),
        ({"budget": 7}, r"budget is the mean cost .* in \(0, 1\]; got 7"),
    ],
    ids=str,
)
def test_plans_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.SurgeryError, match=message):
        subject("timm/vit_pico").sites.plan(**options)


def toy() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Stack(*(mlp(8) for _ in range(4)), head=nn.Linear(8, 3)).eval()
    return model, [torch.randn(16, 8) for _ in range(8)]


def test_gated_models_are_not_pickled_but_copied() -> None:
    model, data = toy()
    gated = gate_all(model, data[0])
    for write in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
        for one in (gated, gated.blocks[0]):
            with pytest.raises(errors.CheckpointError, match=r"cannot be pickled.*surgery\.save\(gated, directory\)"):
                write(one)  # type: ignore[operator]
    for copied in (copy.deepcopy(gated), copy.copy(gated)):
        assert type(copied) is type(gated) and torch.equal(copied(data[0]), gated(data[0]))
    pickle.loads(pickle.dumps(surgery.remove(gated)))


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    model, data = toy()
    (tmp_path / "file").write_text("mine")
    for place in ("file/checkpoint", "file/in/checkpoint"):
        with pytest.raises(errors.CheckpointError, match=r"cannot write .*checkpoint: .*nothing was written"):
            surgery.save(gate_all(model, data[0]), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, data = toy()
    with pytest.raises(
        errors.UnsupportedModel, match=r"made inside torch\.inference_mode\(\).*copy\.deepcopy it outside"
    ):
        surgery.find_sites(model, torch.randn(2, 8))
    assert len(surgery.find_sites(copy.deepcopy(model), data[0])) == 4


def test_work_inside_inference_mode() -> None:
    model, outside = toy()
    options = surgery.Options(steps=2)
    with torch.inference_mode():
        data = [batch.clone() for batch in outside]
        gated = surgery.convert(model, 0.6, data=data, options=options, granularity="sample")
        assert not any(p.is_inference() for p in gated.parameters())
        surgery.train_routers(gated, data, budget=0.6, options=options)
    surgery.train_routers(gated, data, budget=0.6, options=options)  # tensors that were made in there


def test_programs_are_no_modules() -> None:
    model, data = toy()
    exported = torch.export.export(model, (data[0],)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        programs = [torch.jit.trace(model, data[0]), torch.jit.script(nn.Linear(8, 8))]
    compiled = torch.compile(model)
    inside = [(exported, "export"), (compiled, "compile")]
    inside += [(nn.Sequential(made), by) for made, by in inside]
    for program, by in (*inside, *((one, "jit") for one in programs)):
        with pytest.raises(
            errors.UnsupportedModel, match=rf"was made by torch\.{by}.*convert the module that it was made from"
        ):
            surgery.convert(program, 0.6, data=data)


def test_models_wrapped_for_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed, (model, data) = torch.distributed, toy()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(errors.UnsupportedModel, match="convert what is inside, `model.module`"):
            surgery.find_sites(wrapped, data[0])
        gated = surgery.insert_gates(wrapped.module, surgery.find_sites(wrapped.module, data[0]))
        gated.requires_grad_(True)
        again = nn.parallel.DistributedDataParallel(gated, find_unused_parameters=True)
        again(data[0]).sum().backward()
        assert all(p.grad is not None for name, p in gated.named_parameters() if "surgery_gates" not in name)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"seed": "a"}, {"seed": 0.5}, {"samples": 0}, {"samples": True}], ids=str)
def test_numbers_that_are_none(options: dict[str, Any]) -> None:
    model, data = toy()
    (name,) = options
    with pytest.raises(errors.SurgeryError, match=rf"{name} must be a whole number.*got {options[name]!r}"):
        surgery.convert(model, 0.6, data=data, **options)


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples(samples: int) -> None:
    model, data = toy()
    gated = gate_all(model, data[0], skip="affine")
    for fit in (surgery.fit_skip_paths, surgery.regress_routers):
        with pytest.raises(errors.SurgeryError, match="samples must be a whole number of at least 1"):
            fit(gated, data, samples=samples)


@pytest.mark.parametrize("rate", [None, "a", "0.5", [0.5, 0.5], float("nan")])
def test_what_is_no_rate(rate: Any) -> None:
    model, data = toy()
    with (
        pytest.raises(errors.ForceError, match=r"active rate must be in \[0, 1\], got"),
        surgery.force(gate_all(model, data[0]), rate),
    ):
        pass


def test_a_log_is_replayed_by_its_place(tmp_path: Path) -> None:
    model, data = toy()
    gated = gate_all(model, data[0])
    with torch.no_grad(), surgery.record(gated, tmp_path / "log"), surgery.force(gated, 0.5):
        gated(data[0])
    for log in (tmp_path / "log", str(tmp_path / "log"), surgery.read_log(tmp_path / "log")):
        assert surgery.replay(gated, log, data[:1]).rows == 16
