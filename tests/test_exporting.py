"""Files that run without this package: ONNX under onnxruntime, and torch.export programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from subjects import Subject, assert_close, rows, subject
from torch import Tensor

import surgery
from surgery.calling import read_output
from surgery.context import state_of, tape
from surgery.errors import ExportError, MissingDependency, OutputExists
from surgery.exporting import export
from surgery.gates import iter_gates
from surgery.scripts.zoo import call

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
TOLERANCE = 1e-5  # largest difference, relative to the largest value; 5e-7 is what most networks show
CONVERTED = ["timm/vit_pico@sample", "timm/test_resnet", "transformers/bert"]


def run_onnx(path: Path, example: Any) -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    values = [v for v in (example.values() if isinstance(example, dict) else [example]) if isinstance(v, Tensor)]
    feed = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), values, strict=True)}
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(None, feed), strict=True)}


@torch.no_grad()
def in_torch(one: Subject, example: Any) -> tuple[Tensor, dict[str, Tensor]]:
    with surgery.execution(one.gated, "mask"), tape(one.gated) as events:
        output = read_output(call(one.gated, example))
    return output, {event.site: event.decisions for event in events}


def alive(one: Subject, example: Any) -> None:
    """A threshold that closes about half of the gates and that no score of this example is close to."""
    state = state_of(one.gated)

    @torch.no_grad()
    def scores(threshold: float) -> Tensor:
        state.threshold = threshold
        with surgery.execution(one.gated, "mask"), tape(one.gated) as events:
            call(one.gated, example)
        return torch.cat([e.scores.flatten() for e in events])  # type: ignore[union-attr]

    first = scores(0.0)
    candidates = [float(first.quantile(q)) + 1e-3 for q in torch.linspace(0.4, 0.6, 9)]
    state.threshold = max(candidates, key=lambda t: float((scores(t) - t).abs().min()))
    assert float((scores(state.threshold) - state.threshold).abs().min()) > 2e-5


@pytest.fixture
def restored() -> Any:
    touched: dict[int, tuple[Any, float]] = {}

    def remember(one: Subject) -> Subject:
        state = state_of(one.gated)
        touched.setdefault(id(state), (state, state.threshold))
        return one

    yield remember
    for state, threshold in touched.values():
        state.threshold = threshold


@pytest.mark.parametrize("name", CONVERTED)
def test_onnxruntime_agrees(name: str, tmp_path: Path, restored: Any) -> None:
    one = restored(subject(name))
    alive(one, one.example)
    done = export(one.gated, tmp_path / "m.onnx", rows(one.example, [0]), execution="cond", decisions=True)
    ifs = [node for node in onnx.load(done.path).graph.node if node.op_type == "If"]
    assert ifs and {node.domain for node in ifs} == {""}
    kept: list[Tensor] = []
    for index in range(2):
        example = rows(one.example, [index])
        expected, decisions = in_torch(one, example)
        got = run_onnx(done.path, example)
        assert_close([got[done.outputs[0]]], [expected], TOLERANCE)
        assert done.outputs[1:] == tuple(f"decisions.{site}" for site in decisions)
        for site, decision in decisions.items():
            assert torch.equal(got[f"decisions.{site}"], decision), site
        kept += [d.flatten() for d in decisions.values()]
    assert 0.2 < torch.cat(kept).float().mean() < 0.8


def test_gathered_tokens_at_batch_two(tmp_path: Path, restored: Any) -> None:
    one = restored(subject("timm/vit_pico"))
    example = rows(one.example, [0, 1])
    alive(one, example)
    done = export(one.gated, tmp_path / "m.onnx", example, execution="cond", tokens="gather")
    kinds = [node.op_type for node in onnx.load(done.path).graph.node]
    assert "NonZero" in kinds and done.inputs == {"x": tuple(example.shape)}
    assert_close([run_onnx(done.path, example)["output"]], [in_torch(one, example)[0]], TOLERANCE)
    threshold = state_of(one.gated).threshold
    state_of(one.gated).threshold = 1e9  # nobody is active
    done = export(one.gated, tmp_path / "none.onnx", example, execution="cond", tokens="gather")
    assert_close([run_onnx(done.path, example)["output"]], [in_torch(one, example)[0]], TOLERANCE)
    state_of(one.gated).threshold = threshold


def test_weights_lie_in_the_branch_that_uses_them(tmp_path: Path) -> None:
    network = toys.Stack(toys.mlp(32), toys.mlp(32), head=torch.nn.Linear(32, 5), pool=True)
    gated = toys.gate_all(network, torch.randn(2, 4, 32), granularity="sample", skip="identity")
    graph = onnx.load(export(gated, tmp_path / "m.onnx", torch.randn(1, 4, 32), execution="cond").path).graph
    ifs = [node for node in graph.node if node.op_type == "If"]
    inside = [tuple(one.dims) for node in ifs for branch in node.attribute for one in branch.g.initializer]
    outside = [tuple(one.dims) for one in graph.initializer]
    for shape in ((32, 128), (128, 32)):
        assert inside.count(shape) == 2 and shape not in outside
    assert (5, 32) in outside


def test_batches_are_masked_only_when_asked(tmp_path: Path) -> None:
    one = subject("timm/vit_pico@sample")
    with pytest.raises(ExportError, match="decide once per sample.*execution='mask'"):
        export(one.gated, tmp_path / "m.onnx", one.example, execution="cond")
    done = export(one.gated, tmp_path / "m.onnx", one.example, execution="mask")
    assert_close([run_onnx(done.path, one.example)["output"]], [in_torch(one, one.example)[0]], TOLERANCE)
    assert not [node for node in onnx.load(done.path).graph.node if node.op_type == "If"]


def test_a_torch_program_agrees_and_names_its_decisions(tmp_path: Path) -> None:
    one = subject("timm/vit_pico@sample")
    example = rows(one.example, [0])
    done = export(one.gated, tmp_path / "m.pt2", example, execution="cond", decisions=True)
    output, *decisions = torch.export.load(done.path).module()(example)
    expected, found = in_torch(one, example)
    assert_close([output], [expected], TOLERANCE)
    assert [bool(d) for d in decisions] == [bool(d) for d in found.values()]


def test_an_answer_is_exported_as_its_start_and_its_end(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForQuestionAnswering(BertConfig(vocab_size=50, **sizes)).eval()
    example = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    gated = surgery.insert_gates(model, surgery.find_sites(model, example).plan())
    done = export(gated, tmp_path / "m.onnx", example, execution="mask")
    with torch.no_grad(), surgery.execution(gated, "mask"):
        expected = gated(**example)
    assert done.outputs == ("start_logits", "end_logits")
    found = run_onnx(done.path, example)
    assert_close(list(found.values()), [expected.start_logits, expected.end_logits], TOLERANCE)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_static_file_lacks_what_never_runs(suffix: str, tmp_path: Path) -> None:
    gated = toys.gate_all(
        toys.Stack(toys.mlp(32), toys.mlp(32), pool=True), torch.randn(2, 4, 32), granularity="sample"
    )
    x = torch.randn(1, 4, 32)
    whole = export(gated, tmp_path / f"whole.{suffix}", x, execution="cond")
    first, second = (name for name, _ in iter_gates(gated))
    state = state_of(gated)
    state.static, state.budget, state.policy = {first: False, second: True}, 0.5, "static"
    done = export(gated, tmp_path / f"static.{suffix}", x)
    assert done.execution == "static" and done.bytes < 0.75 * whole.bytes
    assert "blocks.0.inner.1.weight" in done.dropped and "blocks.1.inner.1.weight" not in done.dropped
    with torch.no_grad():
        expected = gated(x)
    if suffix == "onnx":
        held = {tuple(i.dims) for i in onnx.load(done.path).graph.initializer}
        names = [i.name for i in onnx.load(done.path).graph.initializer]
        assert held and not [name for name in names if "blocks.0.inner" in name]
        got = run_onnx(done.path, x)["output"]
    else:
        program = torch.export.load(done.path)
        assert not [name for name in program.state_dict if "blocks.0.inner" in name]
        got = program.module()(x)[0]
    assert_close([got], [expected], TOLERANCE)
    assert gated.state_dict()["blocks.0.inner.1.weight"].shape == (128, 32), "the gated model keeps everything"


def test_a_dense_budget_has_no_router(tmp_path: Path) -> None:
    gated = toys.gate_all(toys.Stack(toys.mlp(8), pool=True), torch.randn(2, 4, 8), granularity="sample")
    done = export(gated, tmp_path / "m.onnx", torch.randn(1, 4, 8))
    assert done.execution == "static" and any("router" in name for name in done.dropped)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = subject("timm/vit_pico")
    example = rows(one.example, [0])
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(OutputExists, match="there.pt2 exists"):
        export(one.gated, tmp_path / "there.pt2", example)
    assert (tmp_path / "there.pt2").read_text() == "mine"
    with pytest.raises(ExportError, match="the format is onnx or pt2, got 'h5'"):
        export(one.gated, tmp_path / "m.h5", example)
    import surgery.exporting as module

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r'pip install "bypass-surgery\[onnx\]"'):
        export(one.gated, tmp_path / "m.onnx", example)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.pt2"]


def test_the_file_needs_nothing_but_onnxruntime(tmp_path: Path) -> None:
    import subprocess
    import sys

    one = subject("timm/vit_pico@sample")
    done = export(one.gated, tmp_path / "m.onnx", rows(one.example, [0]), execution="cond")
    code = (
        "import sys, json, numpy, onnxruntime\n"
        f"s = onnxruntime.InferenceSession({str(done.path)!r}, providers=['CPUExecutionProvider'])\n"
        "i = s.get_inputs()[0]\n"
        "s.run(None, {i.name: numpy.zeros(i.shape, numpy.float32)})\n"
        "print(json.dumps(sorted({'torch', 'surgery'} & set(sys.modules))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == []
