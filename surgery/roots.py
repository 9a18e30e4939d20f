"""What a conversion adds to the model itself: one scope per call, and a `train` that leaves the backbone in eval.

Both live in the dynamic subclass that the root gets; its name and module stay those of the model's own class.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from surgery import context, second_look
from surgery.context import Forced, Scope
from surgery.gates import Gate
from surgery.tracing import CACHE_NAMES, Signature, base_class, signature_of

_generation: ContextVar[tuple[int, int] | None] = ContextVar("surgery_generation", default=None)
_INPUTS = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)` inside a scope of its own."""
    cls = base_class(self)

    def run() -> Any:
        with context.entered(_scope_of(self, _arguments(cls, args, kwargs))):
            output = cls.__call__(self, *args, **kwargs)
        if second_look.applies(context.state_of(self)):
            return second_look.look_again(self, output, args, kwargs)
        return output

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
    rows = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 1), 1)
    given = {"input_ids": next((a for a in args[:1] if isinstance(a, Tensor)), kwargs.get("inputs")), **kwargs}
    start = 0 if forced is None else forced.count
    token = _generation.set((start, rows))
    try:
        with context.entered(_tokens(given, forced, rows)):  # of an encoder, which `generate` calls by itself
            return cls.generate(self, *args, **kwargs)
    finally:
        _generation.reset(token)
        if forced is not None:
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
    main, mask = _first(given, _INPUTS), given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or main is None or main.dim() < 2:
        return None
    return mask[:, -main.shape[1] :].bool()


def _first(given: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    return next((given[n] for n in names if isinstance(given.get(n), Tensor)), None)


def _scope_of(model: nn.Module, arguments: Mapping[str, Any]) -> Scope:
    forced = context.overrides_of(context.state_of(model)).forced
    main, decoded = _first(arguments, _INPUTS), _first(arguments, _DECODER_INPUTS)
    rows = len(main) if main is not None else len(decoded) if decoded is not None else _rows(arguments)
    first = context.state_of(model).plan.first_tokens
    scope = _tokens(arguments, forced, rows, first)
    scope.whole = _wants_attentions(model, arguments)
    if decoded is not None:
        own = {
            "input_ids": decoded,
            "attention_mask": arguments.get("decoder_attention_mask"),
            "position_ids": arguments.get("decoder_position_ids"),
            "cache": _cache_of(arguments),
        }
        scope.decoder = _tokens(own, forced, rows, first)
        scope.decoder.whole = scope.whole
    if forced is not None and _generation.get() is None:
        forced.count += rows
    return scope


def _tokens(arguments: Mapping[str, Any], forced: Forced | None, rows: int, first: int = 0) -> Scope:
    """Mask, positions and sample ids of one sequence of tokens."""
    padding = padding_of(arguments)
    scope = Scope(mask=padding, rows=rows)
    if first:
        found = first_tokens_of(arguments, first)
        scope.first = False if found is not None and not bool(found.any()) else found
    if forced is None:
        return scope
    running = _generation.get()
    if running is not None:
        start, count = running
        base = forced.samples if forced.samples is not None else torch.arange(start, start + count)
        scope.samples = base.repeat_interleave(rows // len(base)) if rows % len(base) == 0 else None
        scope.start = start
    else:
        scope.start = forced.count
    scope.positions = _token_positions(arguments)
    return scope


def first_tokens_of(arguments: Mapping[str, Any], count: int) -> Tensor | None:
    """Which tokens of a call are among the first `count` real ones of their sequence, bool `(N, T)`; None where positions are
    unknown.
    """
    positions, padding = _token_positions(arguments), padding_of(arguments)
    if positions is None:
        return None
    first = positions < count
    return first if padding is None or padding.shape != first.shape else first & padding


def _cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key/value cache among a call's arguments, or None."""
    return next((arguments[n] for n in CACHE_NAMES if hasattr(arguments.get(n), "get_seq_length")), None)


def _wants_attentions(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the call returns attention weights: by argument, else by configuration (transformers)."""
    wanted = arguments.get("output_attentions")
    return bool(getattr(getattr(model, "config", None), "output_attentions", False) if wanted is None else wanted)


def _rows(arguments: Mapping[str, Any]) -> int:
    return next((len(v) for v in arguments.values() if isinstance(v, Tensor) and v.dim() > 0), 1)


def _token_positions(arguments: Mapping[str, Any]) -> Tensor | None:
    """Position of every token of a call in its sequence, padding left out, `(N, T)`; None where it holds no tokens."""
    main = _first(arguments, _INPUTS)
    if main is None or main.dim() < 2:
        return None
    length = main.shape[1]
    given = arguments.get("position_ids")
    if isinstance(given, Tensor) and given.dim() == 2:
        return given.expand(len(main), -1)
    past = _cache_of(arguments)
    start = 0 if past is None else int(past.get_seq_length())
    mask = None if padding_of(arguments) is None else arguments["attention_mask"]
    if mask is not None and mask.shape[1] >= start + length:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    return torch.arange(start, start + length, device=main.device).expand(len(main), length)
