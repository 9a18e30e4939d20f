"""A gated model as a file that runs without this package: ONNX, or a `torch.export` program.

`export` pins the model (`surgery.pinning`), captures it with `torch.export`, and writes what was captured. Gates become
`torch.cond`, which ONNX calls `If`. Routers, skip paths and the thresholds of the current budget are inside.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import context
from surgery.calling import Batch, as_batch, call, device_of, dtype_of, read_output, span_of
from surgery.context import state_of
from surgery.errors import ExportError, MissingDependency, OutputExists, SurgeryError, check_choice, first_line
from surgery.gates import iter_gates
from surgery.patterns import signature_of
from surgery.pinning import EXECUTIONS, TOKENS, Execution, Tokens, drop_unused, pin, running_of
from surgery.tracing import base_class

logger = logging.getLogger(__name__)
Format = Literal["onnx", "pt2"]
FORMATS = ("onnx", "pt2")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Args:
        path: The file.
        format: onnx or pt2.
        execution: cond, mask or static.
        inputs: Shape of every input by name.
        outputs: Names of the outputs, in order.
        bytes: Size of everything written.
        dropped: Parameters and buffers that are not in the file, since nothing in it uses them.
    """

    path: Path
    format: str
    execution: str
    inputs: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]
    bytes: int
    dropped: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready form."""
        return {
            "path": str(self.path),
            "format": self.format,
            "execution": self.execution,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "outputs": list(self.outputs),
            "bytes": self.bytes,
            "dropped": list(self.dropped),
        }


class _Noted:
    """Names of a program's outputs; in an object, since torch.export takes back what a module is assigned meanwhile."""

    outputs: tuple[str, ...] = ()


class Program(nn.Module):
    """A pinned model with tensors in and tensors out: the main output (of an answer its start and end), then the decisions
    that are wanted.

    Args:
        pinned: What `surgery.pin` gave.
        batch: The example; what is no tensor in it becomes part of the program.
        decisions: Whether decisions are outputs.
    """

    def __init__(self, pinned: nn.Module, batch: Batch, decisions: bool) -> None:
        super().__init__()
        self.model = pinned
        self.batch = batch
        self.decisions = decisions
        self.noted = _Noted()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`(*outputs, *decisions)`; their names are noted."""
        running = running_of(self.model)
        found: dict[str, Tensor] = {}
        running.decisions = found if self.decisions else None
        try:
            result = call(self.model, self.batch.filled(tensors))
        finally:
            running.decisions = None
        outputs = _outputs(result)
        self.noted.outputs = (*outputs, *(f"decisions.{site}" for site in found))
        return (*outputs.values(), *found.values())


def _outputs(result: Any) -> dict[str, Tensor]:
    """What a program gives of a model's output, by name."""
    if span := span_of(result):
        return span
    output = read_output(result)
    fields = result.items() if isinstance(result, Mapping) else ()
    return {next((str(name) for name, value in fields if value is output), "output"): output}


def export(
    gated: nn.Module,
    path: str | Path,
    example: Any,
    *,
    format: Format | None = None,
    execution: Execution | None = None,
    tokens: Tokens = "mask",
    decisions: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write `gated` at its current budget as one program.

    Args:
        gated: A gated model; it is not changed.
        path: The file to write; its suffix says which format.
        example: What the program will be called with. Shapes are fixed to it, and what is no tensor becomes part of the
            program. Key/value caches are off.
        format: `onnx` or `pt2`, where the suffix does not say it.
        execution: As for `surgery.pin`. By default `static` where the budget's policy is static or dense, else `cond`.
        tokens: As for `surgery.pin`.
        decisions: Whether every gate's decisions are outputs as well, `decisions.<site>`, bool `(N,)` or `(N, T)`;
            those of gates inside another gate's branch are not.
        overwrite: Whether a file of that name may be replaced.

    Returns:
        What was written: names and shapes of inputs, names of outputs, size.

    Raises:
        ExportError: If the format is unknown, the example holds several samples and a gate decides per sample under
            `cond`, or torch cannot capture or translate the model.
        MissingDependency: If the format is onnx, and onnx or onnxscript is not installed.
        OutputExists: If the file exists.
        PinError: If the model cannot be pinned.

    Example:
        >>> export(gated, "model.onnx", torch.randn(1, 3, 224, 224))  # doctest: +SKIP
    """
    target = Path(path).expanduser()
    kind = _format(target, format)
    if target.exists() and not overwrite:
        raise OutputExists(f"{target} exists; give another file, or overwrite=True to replace it")
    mode = execution or _execution(gated)
    check_choice("execution", mode, EXECUTIONS)
    check_choice("tokens", tokens, TOKENS)
    batch = as_batch(example).to(device_of(gated), dtype_of(gated))
    batch = _without_cache(gated, batch)
    _check_batch(gated, batch, mode)
    program, captured, dropped = _capture(gated, batch, mode, tokens, decisions)
    inputs = _inputs(gated, batch)
    outputs = program.noted.outputs
    size = _write(captured, target, kind, tuple(inputs), outputs)
    return Exported(target, kind, mode, inputs, outputs, size, tuple(dropped))


def _format(target: Path, asked: str | None) -> str:
    found = asked or target.suffix.removeprefix(".")
    if found not in FORMATS:
        raise ExportError(
            f"{target.name}: the format is onnx or pt2, got {found!r}; name it FILE.onnx, or pass format="
        )
    if found == "onnx":
        for name in ("onnx", "onnxscript"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise MissingDependency(f'{name} is needed for ONNX: pip install "bypass-surgery[onnx]"') from error
    return found


def _execution(gated: nn.Module) -> Execution:
    state = state_of(gated)
    return "static" if context.default_execution(state, context.NONE) in ("static", "dense") else "cond"


def _check_batch(gated: nn.Module, batch: Batch, execution: str) -> None:
    if execution != "cond" or batch.size == 1:
        return
    sites = [name for name, gate in iter_gates(gated) if not gate.per_token]
    if sites:
        raise ExportError(
            f"{sites[0]} and {len(sites) - 1} more decide once per sample, and a graph has one path for its whole batch of "
            f"{batch.size}; export with one sample (which skips), or with execution='mask' (which runs everything)"
        )


def _without_cache(gated: nn.Module, batch: Batch) -> Batch:
    """A program has no key/value cache: its size would change from call to call."""
    names = [p.name for p in signature_of(base_class(gated)).named]
    if "use_cache" not in names or "use_cache" in batch.kwargs or len(batch.args) > names.index("use_cache"):
        return batch
    return Batch(batch.args, {**batch.kwargs, "use_cache": False})


def _capture(
    gated: nn.Module, batch: Batch, mode: Execution, tokens: Tokens, decisions: bool
) -> tuple[Program, torch.export.ExportedProgram, list[str]]:
    pinned = pin(gated, batch, mode, tokens=tokens)
    program = Program(pinned, batch, decisions).eval()
    captured = _export(program, batch)
    if mode != "static":
        return program, captured, []
    # what only the branches used that never run: torch.export keeps every parameter of the module it is given
    used = {spec.target for spec in captured.graph_signature.input_specs if spec.target and _is_used(captured, spec)}
    dropped = drop_unused(program, [name for name in used if name is not None])
    return program, _export(program, batch), [name.removeprefix("model.") for name in dropped]


def _is_used(captured: torch.export.ExportedProgram, spec: Any) -> bool:
    node = next(node for node in captured.graph.nodes if node.name == spec.arg.name)
    return bool(node.users)


def _export(program: Program, batch: Batch) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(program, batch.tensors, strict=False)
    except SurgeryError:
        raise
    except Exception as error:  # torch.export raises many kinds, most of them private
        raise ExportError(
            f"torch.export cannot capture {type(program.model).__name__}: {type(error).__name__}: {first_line(error)}; "
            "export the dense model (surgery.remove) to see whether the gates or the model are the cause"
        ) from error


def _inputs(gated: nn.Module, batch: Batch) -> dict[str, tuple[int, ...]]:
    names = [p.name for p in signature_of(base_class(gated)).named]
    positional = ((names[i] if i < len(names) else f"input_{i}", value) for i, value in enumerate(batch.args))
    return {name: tuple(v.shape) for name, v in (*positional, *batch.kwargs.items()) if isinstance(v, Tensor)}


def _write(
    captured: torch.export.ExportedProgram, target: Path, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> int:
    """Write beside `target`, then move: the file is there in full or not at all. ONNX puts large weights in a second."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as directory:
            draft = Path(directory) / target.name
            with _quiet():
                if kind == "pt2":
                    torch.export.save(captured, draft)
                else:
                    _write_onnx(captured, draft, inputs, outputs)
            written = sorted(Path(directory).iterdir(), key=lambda file: file == draft)  # the file itself last
            size = sum(file.stat().st_size for file in written)
            for file in written:
                os.replace(file, target.parent / file.name)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}; nothing was written") from error
    return size


def _write_onnx(
    captured: torch.export.ExportedProgram, draft: Path, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> None:
    try:
        translated = torch.onnx.export(
            captured, dynamo=True, input_names=inputs, output_names=outputs, verbose=False, optimize=True
        )
    except Exception as error:  # as for torch.export
        raise ExportError(
            f"torch.onnx cannot translate the program: {type(error).__name__}: {first_line(error)}; "
            "write it as .pt2 instead"
        ) from error
    assert translated is not None
    _sink_weights(translated.model.graph)
    translated.save(str(draft))


def _sink_weights(graph: Any) -> None:
    """Move weights into the only branch of an `If` that uses them.

    ONNX Runtime lays out the weights of a graph for its fast convolutions only where it finds them in that graph.
    """
    for value in list(graph.initializers.values()):
        places = {id(use.node.graph): use.node.graph for use in value.uses()}
        if value.is_graph_output() or len(places) != 1:
            continue
        (place,) = places.values()
        if place is not None and place is not graph:
            del graph.initializers[value.name]
            place.register_initializer(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch's exporters warn about their own deprecations and log every missing torchvision operator."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
