"""Gated models beside what else people do to models: adapters, quantisation, offloading, checkpointing, state dicts."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
import toys
from subjects import assert_close, assert_equal, enliven, outputs, subject, with_skip_paths
from torch import nn
from torch.nn.utils import prune

import surgery
from surgery.context import state_of
from surgery.errors import CheckpointError, NotConverted
from surgery.gates import Gate, iter_gates
from surgery.scripts.zoo import call, find


def fresh(name: str) -> tuple[nn.Module, nn.Module, Any]:
    """A dense network of the zoo and a gated copy of its own."""
    model, example = find(name).build()
    gated = enliven(surgery.insert_gates(model, with_skip_paths(surgery.find_sites(model, example).plan())))
    return model, gated, example


def budgeted(gated: nn.Module) -> nn.Module:
    """Routers decide without an `execution` block."""
    state_of(gated).budget = 0.5
    return gated


def test_lora_trains_on_top_of_a_gated_model() -> None:
    peft = pytest.importorskip("peft")
    model, gated, example = fresh("transformers/bert")
    budgeted(gated)
    with torch.no_grad():
        before = call(gated, example).logits
    tuned = peft.get_peft_model(gated, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=True))
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert any(isinstance(module, Gate) for module in tuned.modules())
    with torch.no_grad():
        assert_close([call(tuned, example).logits], [before])
    backbone = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 1.0)
    for _ in range(2):  # the first step moves one factor of each pair, the second both
        loss = call(tuned, example).logits.square().sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad(), surgery.tape(gated) as events:
        after = call(tuned, example).logits
    assert not torch.allclose(after, before) and len(events) == len(state_of(gated).names)
    assert_equal(list(model.state_dict().values()), list(backbone.values()))


def test_lora_adapts_active_query_tokens_as_masked_ones() -> None:
    peft = pytest.importorskip("peft")
    _, gated, example = fresh("transformers/bert")
    tuned = peft.get_peft_model(gated, peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    results = []
    for mode in ("mask", "skip"):
        with torch.no_grad(), surgery.execution(gated, mode):  # type: ignore[arg-type]
            results.append(call(tuned, example).logits)
    assert_close([results[1]], [results[0]])


def test_a_model_of_peft_is_saved_beside_its_gates_only(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    one = subject("transformers/bert")
    tuned = peft.get_peft_model(copy.deepcopy(one.model), peft.LoraConfig(r=2, target_modules=["query"])).eval()
    gated = surgery.insert_gates(tuned, surgery.find_sites(tuned, one.example).plan())
    for form in ("base", "native"):
        with pytest.raises(CheckpointError, match="merge adapters before converting"):
            surgery.save(gated, tmp_path / form, **{form: True})
        assert not (tmp_path / form).exists()
    surgery.save(gated, tmp_path / "gates")
    assert_equal(outputs(surgery.load(tmp_path / "gates", model=tuned), one.example), outputs(gated, one.example))


def test_the_gated_model_inside_a_wrapper_is_named() -> None:
    peft = pytest.importorskip("peft")
    gated = copy.deepcopy(subject("transformers/bert").gated)
    tuned = peft.get_peft_model(gated, peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(
        NotConverted, match="has no gates; the converted model inside of it has: give its `base_model.model`"
    ):
        surgery.status(tuned)
    with pytest.raises(NotConverted, match="str has no gates; convert it first"):
        surgery.status("bert-c60")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["timm/vit_pico", "transformers/bert"])
def test_gates_on_int8_linear_layers(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, example = find(name).build()
    plan = with_skip_paths(surgery.find_sites(model, example).plan())
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    kinds = {type(p.data).__name__ for p in model.parameters()}
    assert len(kinds) > 1, "something is quantised"
    expected = outputs(model, example)
    gated = enliven(surgery.insert_gates(model, plan))
    with surgery.execution(gated, "skip"), surgery.force(gated, 1.0):
        assert_equal(outputs(gated, example), expected)
    # activations are quantised row by row, so active tokens alone give what they give among others; but where sums come out
    # otherwise in their last bit, a value now and then is rounded to its other neighbour, as happens where the last bit of what
    # the first norm gives is another
    norm = next(module for module in gated.modules() if isinstance(module, nn.LayerNorm))
    differences, noise = [], []
    for seed in range(12):
        example = find(name).example(2, seed=seed)

        def run(mode: Any, example: Any = example, seed: int = seed) -> torch.Tensor:
            with surgery.execution(gated, mode), surgery.force(gated, 0.5, seed=seed, samples=[0, 1]):
                found: torch.Tensor = outputs(gated, example)[0]
            return found

        masked = run("mask")
        differences.append(float((run("skip") - masked).abs().max() / masked.abs().max()))
        hook = norm.register_forward_hook(lambda _, __, output: output * (1 + 6e-8 * torch.randn_like(output).sign()))
        noise += [float((run("mask") - masked).abs().max() / masked.abs().max()) for _ in range(3)]
        hook.remove()
    # other decisions differ by 0.2 to 3
    assert min(differences) < 1e-5 and max(noise) < 0.1, (differences, noise)
    assert max(differences) < 2 * max(noise) and mean(differences) < 2 * mean(noise), (differences, noise)


def test_offloading_to_the_cpu() -> None:
    accelerate = pytest.importorskip("accelerate")
    _, gated, example = fresh("transformers/bert")
    expected = outputs(budgeted(gated), example)
    offloaded = accelerate.cpu_offload(gated, execution_device=torch.device("cpu"))
    assert all(p.device.type == "meta" for n, p in offloaded.named_parameters() if "encoder.layer" in n)
    assert_equal(outputs(offloaded, example), expected)


def test_a_device_map_with_parts_on_disk(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    _, gated, example = fresh("transformers/llama")
    expected = outputs(budgeted(gated), example)
    devices = accelerate.infer_auto_device_map(gated, max_memory={"cpu": 40_000, "disk": 10**9})
    devices = {name: device if device == "disk" else "cpu" for name, device in devices.items()}
    assert "disk" in devices.values()
    dispatched = accelerate.dispatch_model(gated, device_map=devices, main_device="cpu", offload_dir=tmp_path)
    # attention runs for all query tokens here: the weights that say which rows are queries are elsewhere until it is called
    assert_close(outputs(dispatched, example), expected)


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_gradient_checkpointing_gives_the_same_gradients(granularity: str) -> None:
    model, example = find("transformers/bert").build()
    example["attention_mask"][0, -4:] = 0  # type: ignore[call-overload, index]
    plan = with_skip_paths(surgery.find_sites(model, example).plan(granularity=granularity))  # type: ignore[arg-type]
    gated = budgeted(enliven(surgery.insert_gates(model, plan)))
    parameters = [p for _, gate in iter_gates(gated) for p in gate.skip_path.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(gated, "activation_checkpointing_enable", None) or gated.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # type: ignore[operator]
            # transformers checkpoints while training; the backbone of a gated model otherwise stays in eval
            for module in gated.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        runs: list[int] = []
        # inside the layer, whose own hooks run once; before a gate, since recomputing stops where it has what it needs
        _, gate = next(iter_gates(gated))
        hook = gate.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))  # type: ignore[misc]
        call(gated, example).logits.square().sum().backward()  # layers run again after the call is over
        hook.remove()
        assert len(runs) == 1 + checkpointing
        found.append([p.grad.clone() if p.grad is not None else torch.zeros(()) for p in parameters])
        for parameter in parameters:
            parameter.grad = None
    assert any(bool(gradient.any()) for gradient in found[0])
    assert_close(found[1], found[0], 1e-5)


def test_a_state_dict_goes_through_torch_save() -> None:
    one = subject("timm/vit_pico")
    file = io.BytesIO()
    torch.save(one.gated.state_dict(), file)
    file.seek(0)
    again = surgery.insert_gates(one.model, one.plan)
    state_of(again).threshold = state_of(one.gated).threshold
    again.load_state_dict(torch.load(file, weights_only=True))
    with surgery.execution(one.gated, "mask"), surgery.execution(again, "mask"):
        assert_equal(outputs(again, one.example), outputs(one.gated, one.example))


class Scripted(nn.Module):
    """A residual block around a program of `torch.jit`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(toys.mlp(8))

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        made = self.inner(x)
        return x + made if scale is None else x + scale * made


@pytest.mark.filterwarnings("ignore")
def test_programs_of_jit_inside_a_model() -> None:
    model, x = nn.Sequential(Scripted(), Scripted()).eval(), torch.randn(3, 4, 8)
    before = toys.frozen(model)
    gated = enliven(surgery.insert_gates(model, with_skip_paths(surgery.find_sites(model, x).plan())))
    with surgery.force(gated, 1.0), torch.no_grad():
        assert_equal([gated(x), gated[0](x, 0.5)], [model(x), model[0](x, 0.5)])  # type: ignore[index]
    masked = outputs_in(gated, "mask", x)
    assert_close(outputs_in(gated, "skip", x), masked)
    assert not torch.allclose(masked[0], model(x))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for name, p in gated.named_parameters() if "surgery_gates" not in name)
    gated.double()
    toys.assert_same(dict(model.state_dict()), before)


def outputs_in(gated: nn.Module, mode: Any, x: torch.Tensor) -> list[torch.Tensor]:
    with surgery.execution(gated, mode):
        return outputs(gated, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["weight_norm", "pruning"])
def test_weights_that_hooks_compute(change: str) -> None:
    model, x = toys.Stack(toys.mlp(8), toys.mlp(8)).eval(), torch.randn(3, 4, 8)
    layer: Any = model.blocks[0].inner[1]  # type: ignore[index, union-attr]
    if change == "weight_norm":
        nn.utils.weight_norm(layer)
    else:
        prune.l1_unstructured(layer, "weight", 0.5)
    assert layer.weight.grad_fn is not None
    gated = enliven(surgery.insert_gates(model, with_skip_paths(surgery.find_sites(model, x).plan())))
    with surgery.force(gated, 1.0), torch.no_grad():
        assert_equal([gated(x)], [model(x)])
    assert_close(outputs_in(gated, "skip", x), outputs_in(gated, "mask", x))


@pytest.mark.parametrize("granularity", ["sample", "token"])
def test_gradients_per_sample(granularity: Any) -> None:
    model, x = toys.Stack(toys.mlp(8), toys.mlp(8)).eval().requires_grad_(False), torch.randn(4, 5, 8)
    plan = with_skip_paths(surgery.find_sites(model, x).plan(granularity=granularity))
    gated = budgeted(enliven(surgery.insert_gates(model, plan)))
    weights = {name: p.detach() for name, p in gated.named_parameters() if "surgery_gates" not in name}

    def loss(given: dict[str, torch.Tensor], one: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.func.functional_call(gated, given, (one[None],))
        return made.square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    assert any(bool(gradient.any()) for gradient in together.values())
    for index in range(4):
        for name, gradient in torch.func.grad(loss)(weights, x[index]).items():
            assert_close([together[name][index]], [gradient], 1e-4)


def test_two_gated_versions_of_one_base_share_its_weights() -> None:
    model = toys.Stack(toys.mlp(8), toys.mlp(8)).eval()
    x = torch.randn(2, 4, 8)
    sites = surgery.find_sites(model, x)
    first = enliven(surgery.insert_gates(model, sites.plan(granularity="sample")), 1)
    second = enliven(surgery.insert_gates(model, sites.plan(granularity="token")), 2)
    for name, parameter in model.named_parameters():
        pointers = {m.get_parameter(name).data_ptr() for m in (model, first, second)}
        assert pointers == {parameter.data_ptr()}, name
    with torch.no_grad():
        dense = model(x)
        alone = {}
        for key, gated in (("first", first), ("second", second)):
            with surgery.execution(gated, "skip"):
                alone[key] = gated(x)
        with surgery.execution(first, "skip"), surgery.execution(second, "mask"), surgery.force(first, 0.0):
            closed, other = first(x), second(x)
            assert torch.equal(model(x), dense)
    torch.testing.assert_close(other, alone["second"])
    assert not torch.equal(closed, alone["first"])
    assert not torch.equal(alone["first"], alone["second"])
