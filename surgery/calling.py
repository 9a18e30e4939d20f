"""One form for everything that a model is called with, and one way to read what it returns.

Axis letters: `N` samples, `T` tokens, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery.errors import DataError, SurgeryError

Outputs = Literal["auto", "logits", "values"]
"""What a model's outputs hold: logits, of which the largest counts, or values, as of a regression or an embedding."""
PROMPT = 0.5
"""Share of every text that counts as its prompt in passes over data (fitting, calibration, scoring), where gates decide once
per prompt."""
_reads_texts: ContextVar[bool] = ContextVar("surgery_reads_texts", default=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one call, the labels that came with them (never passed to the model), and its number in the data."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    number: int | None = None

    @property
    def size(self) -> int:
        """Number of samples `N`: the first axis of the first tensor, of those in lists and dicts only where there is no other."""
        for value in (*self.args, *self.kwargs.values(), *self.tensors):
            if isinstance(value, Tensor) and value.dim() > 0:
                return value.shape[0]
        raise DataError(f"a batch holds no tensor: got {_describe(self)}")

    @property
    def where(self) -> str:
        """How messages about it begin: `batch 3 of the data: `, or nothing where it is no part of data."""
        return "" if self.number is None else f"batch {self.number} of the data: "

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments, also those in tuples, lists and dicts, in order."""
        found: list[Tensor] = []
        self.mapped(lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
        return tuple(found)

    def filled(self, tensors: Sequence[Tensor]) -> Batch:
        """The same call with other `tensors`, in the order of `self.tensors`."""
        left = iter(tensors)
        return replace(self.mapped(lambda _: next(left)), labels=None)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same call with every tensor in it changed; labels stay."""
        args = tuple(_mapped(change, value) for value in self.args)
        return replace(self, args=args, kwargs={name: _mapped(change, value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move every tensor to `device`, floating-point inputs to `dtype`."""
        labels = None if self.labels is None else self.labels.to(device)
        moved = self.mapped(lambda v: v.to(device, dtype if dtype is not None and v.is_floating_point() else None))
        return replace(moved, labels=labels)

    @property
    def device(self) -> torch.device:
        """Where its first tensor is."""
        return self.tensors[0].device

    def rows(self, index: Tensor) -> Batch:
        """The samples that `index` names; values without a batch axis stay."""
        n = self.size

        def cut(value: Tensor) -> Tensor:
            return value[index] if value.dim() > 0 and value.shape[0] == n else value

        return replace(self.mapped(cut), labels=None if self.labels is None else cut(self.labels))


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with the tensors in it, and in its tuples, lists and dicts, changed."""
    one = lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf  # noqa: E731  (short)
    return tree_map(one, value, is_leaf=lambda node: not isinstance(node, (tuple, list, dict)))


def as_batch(value: Any) -> Batch:
    """Read a tensor, a tuple `(inputs, labels)`, a dict of keyword arguments, or a `Batch`.

    A tuple or list whose second and last element is a 1-D integer tensor (or, for language models, None) is
    `(inputs, labels)`; any other tuple is the positional arguments. Inputs beside labels may be a tuple of positional
    arguments as well.

    Raises:
        DataError: If it is none of these, holds NaN, or holds no sample.
    """
    if isinstance(value, Batch):
        batch = value
    elif isinstance(value, Tensor):
        batch = Batch((value,))
    elif isinstance(value, Mapping):
        kwargs = {k: v for k, v in value.items() if k not in ("labels", "label")}
        batch = Batch((), kwargs, value.get("labels", value.get("label")))
    elif isinstance(value, (tuple, list)) and value:
        if len(value) == 2 and _is_labels(value[1]):
            inner = Batch(tuple(value[0])) if isinstance(value[0], (tuple, list)) else as_batch(value[0])
            batch = Batch(inner.args, inner.kwargs, value[1])
        else:
            batch = Batch(tuple(value))
    else:
        raise DataError(
            f"a batch must be a tensor, a tuple (inputs, labels), or a dict of keyword arguments; got {type(value).__name__}"
        )
    size = next((len(v) for v in batch.tensors if v.dim() > 0), None)
    if size == 0:
        shape = next(tuple(v.shape) for v in batch.tensors if v.dim() > 0)
        raise DataError(f"a batch holds no sample: its first tensor has shape {shape}")
    named: list[tuple[int | str, Any]] = [*enumerate(batch.args), *batch.kwargs.items()]
    for name, item in named:
        for tensor in _tensors(item):
            _check_finite(name, tensor, size)
    return batch.mapped(_tracked) if any(v.is_inference() for v in batch.tensors) else batch


def _tracked(value: Tensor) -> Tensor:
    """The tensor, or a copy of one made in `torch.inference_mode()` that gradients may pass."""
    return value.clone() if value.is_inference() and not torch.is_inference_mode_enabled() else value


def _check_finite(name: int | str, item: Tensor, size: int | None) -> None:
    """Refuse NaN and infinity, but for the minus infinity that stands for "not seen" in masks and in what samples share."""
    if not item.is_floating_point() or item.device.type == "meta":
        return
    masks = "mask" in str(name) or (item.dim() > 0 and len(item) != size)
    finite = torch.isfinite(item) | (item == -torch.inf) if masks else torch.isfinite(item)
    if not finite.all():
        raise DataError(
            f"input {name!r} of shape {tuple(item.shape)} holds NaN or infinity{_rows_without(finite)}; clean or leave out "
            "these samples"
        )


def batches(data: Iterable[Any]) -> Iterator[Batch]:
    """Read every element of `data` with `as_batch`.

    Raises:
        DataError: If there is none, one is none (its number counts from 0), or `data` is itself one batch.
    """
    check_batches(data)
    empty = True
    for number, value in numbered(data):
        empty = False
        try:
            batch = as_batch(value)
        except DataError as error:
            raise DataError(f"batch {number} of the data: {error}") from error
        yield batch if batch.number is not None else replace(batch, number=number)
    if empty:
        raise DataError(
            "the data yields no batch: it is empty, or it is an iterator that was already read to its end; pass a list, a "
            "DataLoader, or a dataset"
        )


def check_batches(data: Iterable[Any]) -> None:
    """Raise `DataError` for one batch in the place of many, and for what cannot be iterated over."""
    if isinstance(data, (Tensor, dict, str)) or not isinstance(data, Iterable):
        raise DataError(f"data must be batches to iterate over, got {type(data).__name__}; for one batch pass [batch]")


def numbered(data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The elements of `data` with their numbers; a part of some data knows the numbers in the whole."""
    given: Callable[[], Iterator[tuple[int, Any]]] | None = getattr(data, "numbered", None)
    return iter(enumerate(data)) if given is None else given()


def length_of(data: Iterable[Any]) -> int | None:
    """Number of batches, or None where it is unknown: a `DataLoader` over a stream has a `__len__` that raises."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def call(model: nn.Module, batch: Batch) -> Any:
    """`model(*args, **kwargs)`; of a text, the first `PROMPT` counts as its prompt unless something else is said."""
    token = _reads_texts.set(True)
    try:
        return model(*batch.args, **batch.kwargs)
    finally:
        _reads_texts.reset(token)


def is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model that can generate (transformers)."""
    can_generate = getattr(model, "can_generate", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate is not None and bool(can_generate()) and not encodes


def reads_texts() -> bool:
    """Whether the running call is one over data, as in calibration, and not a user's own."""
    return _reads_texts.get()


def refusal(model: nn.Module, batch: Batch, error: Exception) -> DataError:
    """What to raise where a model fails on data."""
    items = [*((str(i), v) for i, v in enumerate(batch.args)), *batch.kwargs.items()]
    found = ", ".join(
        f"{name}: {str(v.dtype).removeprefix('torch.')} {list(v.shape)}"
        if isinstance(v, Tensor)
        else f"{name}: {type(v).__name__}"
        for name, v in items
    )
    return DataError(
        f"{batch.where}{type(model).__name__} refuses what it is called with ({found}): {type(error).__name__}: {error}; "
        f"give what the dense model takes, in every batch: a tensor, a tuple, or a dict of keyword arguments{_no_labels(batch)}"
    )


def _no_labels(batch: Batch) -> str:
    """What counts as labels, where the second of two arguments may have been meant as such, or was taken for them."""
    if batch.labels is not None and not batch.kwargs:
        return (
            "; the second of a pair of tensors was taken for labels, since it holds whole numbers of shape (N,): if the model "
            "takes it (time steps, lengths), give the arguments in a dict, by name"
        )
    last = batch.args[1] if len(batch.args) == 2 and not batch.kwargs else None
    if not isinstance(last, Tensor) or last.dim() == 0 or len(last) != batch.size:
        return ""
    return (
        "; of a pair (inputs, labels) labels are whole numbers of shape (N,), and the second one here is none such, so it was "
        "passed to the model: give class numbers, or the inputs alone"
    )


REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model raises when it is called with something wrong."""


def call_dense(model: nn.Module, batch: Batch) -> Any:
    """`call` of a dense model on the user's data.

    Raises:
        DataError: If the model refuses the batch.
    """
    try:
        return call(model, batch)
    except (SurgeryError, torch.OutOfMemoryError):
        raise
    except REFUSALS as error:
        raise refusal(model, batch, error) from error


def span_of(output: Any) -> dict[str, Tensor]:
    """The logits of where an answer begins and ends, each `(N, T)`, by name; empty where the output holds none."""
    found = {name: getattr(output, name, None) for name in ("start_logits", "end_logits")}
    known = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return known if len({value.shape for value in known.values()}) == 1 and len(known) == 2 else {}


def read_output(output: Any) -> Tensor:
    """The tensor that matters: logits where there are some, else the first floating-point tensor.

    Returns:
        `(N, K)` class logits, `(N, T, K)` token logits, `(N, 2, T)` logits of an answer's first and last token, `(N,)`
        numbers, or an embedding of any shape.

    Raises:
        DataError: If the output holds no floating-point tensor, or single numbers only.
    """
    if span := span_of(output):
        return torch.stack(list(span.values()), 1)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    found = [value for value in tensors(output) if value.is_floating_point()]
    for value in found:
        if value.dim() > 0:
            return value
    if found:
        raise DataError(
            "the model's output is one number for a whole batch, such as a loss; expected one row for every sample: call "
            "it without labels, or give a module that returns its predictions"
        )
    raise DataError(f"cannot find a floating-point tensor in the model's output of type {type(output).__name__}")


def is_logits(model: nn.Module, batch: Batch, output: Any, outputs: Outputs = "auto") -> bool:
    """Whether the largest entry of an output's last axis means something; where nothing tells, that of `(N, K)` does."""
    told = kind_of(model, batch, output, outputs)
    return told == "logits" or (told == "auto" and isinstance(output, Tensor) and output.dim() == 2)


def kind_of(model: nn.Module, batch: Batch, output: Any, outputs: Outputs = "auto") -> Outputs:
    """What an output holds: what the user said in `outputs`, else what the model, its shape or its labels tell, if they do."""
    if outputs != "auto":
        return outputs
    problem = getattr(getattr(model, "config", None), "problem_type", None)  # transformers
    if problem in ("regression", "multi_label_classification"):
        return "values"
    value, labels = read_output(output), batch.labels
    if labels is not None and labels.is_floating_point() and labels.shape == value.shape:
        return "values"  # several classes at once, or several numbers
    if span_of(output):
        return "logits"
    if value.dim() not in (2, 3) or value.shape[-1] < 2:
        return "values"
    if any(getattr(output, name, None) is value for name in ("logits", "logits_per_image")):
        return "logits"
    classes = getattr(model, "num_classes", None)  # timm's models without a head have none
    if classes == 0 or getattr(output, "last_hidden_state", None) is value:
        return "values"
    per_token = isinstance(output, Tensor) and value.dim() == 3
    return "logits" if per_token and (batch.labels is not None or _is_vocabulary(batch, value)) else "auto"


def _is_vocabulary(batch: Batch, output: Tensor) -> bool:
    """Whether `(N, T, K)` may be logits over the ids that a model was called with, rather than hidden states."""
    ids = batch.kwargs.get("input_ids", batch.args[0] if batch.args else None)
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != output.shape[:2]:
        return False
    return int(ids.max()) < output.shape[-1]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nested output, in order; of an object of the user's own, those among its attributes."""
    return list(_tensors(value)) or list(_tensors(getattr(value, "__dict__", None)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; every module's own mode comes back on every path."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer (cpu when there is none)."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Dtype of the first floating-point parameter, or None."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for one in fields(value):
            yield from _tensors(getattr(value, one.name, None))


def _is_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dim() == 1


def _rows_without(finite: Tensor) -> str:
    """The first rows that hold something else, in words."""
    if finite.dim() == 0:
        return ""
    rows = (~finite.reshape(len(finite), -1).all(1)).nonzero().flatten().tolist()
    return f" in {'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows[:5]))}{', …' if len(rows) > 5 else ''}"


def _describe(batch: Batch) -> str:
    return ", ".join(type(v).__name__ for v in (*batch.args, *batch.kwargs.values())) or "nothing"
