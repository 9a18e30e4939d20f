"""What a conversion adds to the model itself: one scope per call, and a `train` that leaves the backbone in eval.

Both live in the dynamic subclass that the root gets; its name and module stay those of the model's own class.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from surgery import context
from surgery.context import Scope
from surgery.gates import Gate
from surgery.tracing import Signature, base_class, signature_of

_generation: ContextVar[tuple[int, int] | None] = ContextVar("surgery_generation", default=None)
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "input_values", "pixel_values")


def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)` inside a scope of its own."""
    cls = base_class(self)

    def run() -> Any:
        with context.entered(_scope_of(self, _arguments(cls, args, kwargs))):
            return cls.__call__(self, *args, **kwargs)

    recorder = context.overrides_of(context.state_of(self)).recorder
    return run() if recorder is None else recorder(run, args, kwargs)


def train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Put gates in training mode; the backbone (dropout, BatchNorm) stays in eval."""
    base_class(self).train(self, False)
    for module in self.modules():
        if isinstance(module, Gate):
            module.train(mode)
    return self


def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model.generate(...)`, all steps of which hold the same samples."""
    cls: Any = base_class(self)
    forced = context.overrides_of(context.state_of(self)).forced
    if forced is None:
        return cls.generate(self, *args, **kwargs)
    rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1), 1)
    token = _generation.set((forced.count, rows))
    try:
        return cls.generate(self, *args, **kwargs)
    finally:
        _generation.reset(token)
        forced.count += rows


def namespace(cls: type[nn.Module]) -> dict[str, Any]:
    """What the root's subclass overrides."""
    methods: dict[str, Any] = {"__call__": call, "train": train}
    if hasattr(cls, "generate"):
        methods["generate"] = generate
    if hasattr(cls, "_set_gradient_checkpointing"):
        methods["_set_gradient_checkpointing"] = _checkpointing(cls)
    if any(base.__module__ == "transformers.modeling_utils" for base in cls.__mro__):
        methods["save_pretrained"] = _saving(cls)
    return methods


def forget_loading(model: nn.Module) -> None:
    """Take away what transformers notes on a model that it loaded with its gates; for one that has none any more."""
    config: Any = getattr(model, "config", None)
    if getattr(getattr(config, "quantization_config", None), "quant_method", None) != "surgery":
        return
    del config.quantization_config
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)


def _saving(cls: Any) -> Callable[..., Any]:
    """transformers' way to save, gates included: `from_pretrained` gives the gated model back."""
    original = cls.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from surgery.adapters import huggingface_native

        return huggingface_native.save_pretrained(self, original, *args, **kwargs)

    return save_pretrained


def _checkpointing(cls: Any) -> Callable[..., Any]:
    """transformers' way to turn gradient checkpointing on, for layers that decide again what they decided before.

    A layer is run a second time during `backward`, after the call and its padding mask are gone.
    """
    original = cls._set_gradient_checkpointing

    @functools.wraps(original)
    def switch(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        function = kwargs.get("gradient_checkpointing_func")
        if function is not None:
            kwargs["gradient_checkpointing_func"] = functools.partial(_in_this_context, function)
        return original(self, *args, **kwargs)

    return switch


def _in_this_context(checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    here = contextvars.copy_context()
    return checkpoint(lambda *inputs, **more: here.copy().run(layer, *inputs, **more), *args, **kwargs)


_signatures: dict[type, Signature] = {}


def _arguments(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if not args:
        return dict(kwargs)
    if cls not in _signatures:
        _signatures[cls] = signature_of(cls)
    names = [p.name for p in _signatures[cls].named]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def padding_of(given: Mapping[str, Any]) -> Tensor | None:
    """The attention mask of a call's arguments, bool `(N, T)`, or None."""
    main, mask = _main(given), given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or main is None or main.dim() < 2:
        return None
    return mask[:, -main.shape[1] :].bool()


def _main(given: Mapping[str, Any]) -> Tensor | None:
    return next((given[n] for n in _INPUTS if isinstance(given.get(n), Tensor)), None)


def _scope_of(model: nn.Module, arguments: Mapping[str, Any]) -> Scope:
    main, mask = _main(arguments), arguments.get("attention_mask")
    padding = padding_of(arguments)
    if padding is None:
        mask = None
    length = 0 if main is None or main.dim() < 2 else main.shape[1]
    forced = context.overrides_of(context.state_of(model)).forced
    scope = Scope(mask=padding)
    if forced is None:
        return scope
    rows = len(main) if main is not None else _rows(arguments)
    running = _generation.get()
    if running is not None:
        start, count = running
        base = forced.samples if forced.samples is not None else torch.arange(start, start + count)
        scope.samples = base.repeat_interleave(rows // len(base)) if rows % len(base) == 0 else None
        scope.start = start
    else:
        scope.start = forced.count
        forced.count += rows
    scope.positions = _token_positions(arguments, mask, main, length)
    return scope


def _rows(arguments: Mapping[str, Any]) -> int:
    return next((len(v) for v in arguments.values() if isinstance(v, Tensor) and v.dim() > 0), 1)


def _token_positions(
    arguments: Mapping[str, Any], mask: Tensor | None, main: Tensor | None, length: int
) -> Tensor | None:
    if main is None or length == 0:
        return None
    given = arguments.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.expand(len(main), -1)
    if mask is not None:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    past = arguments.get("past_key_values")
    start = 0 if past is None or not hasattr(past, "get_seq_length") else int(past.get_seq_length())
    return torch.arange(start, start + length, device=main.device).expand(len(main), length)
