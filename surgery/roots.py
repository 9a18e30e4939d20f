"""What a conversion adds to the model itself: one scope per call, and a `train` that leaves the backbone in eval.

Both live in the dynamic subclass that the root gets; its name and module stay those of the model's own class.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import context, second_look
from surgery.calling import PROMPT, reads_texts
from surgery.context import Forced, Scope
from surgery.errors import PlanMismatch, PromptError
from surgery.gates import Gate
from surgery.patterns import Signature, signature_of
from surgery.prompts import Kept, cache_in, keep, kept_with, span
from surgery.state import GatedState
from surgery.tracing import CACHE_NAMES, base_class


@dataclass(frozen=True, slots=True)
class _Generation:
    """A running `generate`: its first sample's id, its number of samples, its prompt's length, and which tokens of the prompt
    are real, bool `(N, T)` or None.
    """

    start: int
    rows: int
    width: int
    real: Tensor | None


_generation: ContextVar[_Generation | None] = ContextVar("surgery_generation", default=None)
_INPUTS = ("input_ids", "inputs_embeds", "input_values", "input_features", "pixel_values")
_UNSEEN = ("flash", "flex", "paged")
"""In the names of attention implementations that call neither torch's attention product nor two matrix products."""
_PACKED = "cu_seq_lens_q"
"""What transformers passes where a row holds several sequences: in continuous batching, and in batches without padding."""
_NOTES = ("output_attentions", "output_router_logits")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")


def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`model(...)` inside a scope of its own."""
    cls = base_class(self)

    def run() -> Any:
        arguments = _arguments(cls, args, kwargs)
        with context.entered(_scope_of(self, arguments)) as scope:
            output = cls.__call__(self, *args, **kwargs)
        if scope.kept is not None and scope.kept.decisions and not scope.continues:
            _keep(scope.kept, _cache_of(arguments), output)
        if second_look.margin_in_force(context.state_of(self)) is not None:
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
    prompt = _first(given, _INPUTS)
    width = 1 if prompt is None or prompt.dim() < 2 else prompt.shape[1]
    token = _generation.set(_Generation(start, rows, width, padding_of(given)))
    try:
        encoder = _tokens(given, forced, rows)  # `generate` calls it by itself
        encoder.whole = _returns_notes(self, given)
        with context.entered(encoder):
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
    decoded, rows = _first(arguments, _DECODER_INPUTS), samples_in(arguments)
    first = context.state_of(model).plan.first_tokens
    scope = _tokens(arguments, forced, rows, first)
    scope.whole = _returns_notes(model, arguments)
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
    _check_attention(model)
    if arguments.get(_PACKED) is not None:
        _check_packed(context.state_of(model))
    if any(planned.granularity == "prefill" for planned in context.state_of(model).plan.sites):
        _see_prompt(scope, context.state_of(model), arguments)
    return scope


def _check_attention(model: nn.Module) -> None:
    """Refuse implementations of attention whose product cannot be seen, where gates work inside of it.

    Raises:
        PlanMismatch: If there is such a gate in this call.
    """
    name = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if not any(word in name for word in _UNSEEN) or context.runs_dense(state := context.state_of(model)):
        return
    inside = [p.site.name for p in state.plan.sites if p.site.heads or (p.site.query and p.granularity != "sample")]
    if inside:
        raise PlanMismatch(
            f"{inside[0]}: attention runs as {name!r}, inside of which no token or head can be left out; "
            "use model.set_attn_implementation('sdpa'), or 'eager'"
        )


def _check_packed(state: GatedState) -> None:
    """Refuse several sequences in one row where routers decide once for a row, since one sequence would decide for another.

    Raises:
        PlanMismatch: If there is such a gate in this call.
    """
    over = context.overrides_of(state)
    if over.forced is not None or context.default_execution(state, over) in ("dense", "static"):
        return
    apart = [p.site.name for p in state.plan.sites if p.granularity != "token" and not p.always_on]
    if apart:
        raise PlanMismatch(
            f"{apart[0]}: this call holds several sequences in one row (continuous batching, or a batch without padding), and "
            "would decide once for all of them; use generate() or padded batches, or convert with granularity='token'"
        )


def _see_prompt(scope: Scope, state: GatedState, arguments: Mapping[str, Any]) -> None:
    """Find what was decided for the sequences of this call, or from which tokens it is to be decided.

    Raises:
        PromptError: If the cache was filled in another way, or holds a part of the prompt only.
    """
    cache = _cache_of(arguments)
    known = kept_with(cache)
    scope.continues = cache is not None and int(cache.get_seq_length()) > 0
    scope.kept = known if scope.continues and known is not None else Kept()
    if scope.continues:
        if known is not None and known.compact and context.runs_dense(state):
            raise PromptError(
                "this cache lacks keys and values of what its sequences skip, so the dense model cannot go on with it; "
                "keep the budget and execution that it was begun with, or begin again with an empty cache"
            )
        if known is not None and known.compact and scope.whole:
            raise PromptError(
                "this cache lacks keys of what its sequences skip, so not all attention weights can be given; ask for "
                "output_attentions from the prompt on"
            )
        return
    main, running = _first(arguments, _INPUTS), _generation.get()
    if main is None or main.dim() < 2:
        return
    rows, tokens = main.shape[:2]
    length = context.overrides_of(state).prompt
    if length is None and running is not None:
        if tokens < running.width:
            raise PromptError(
                f"the prompt of {running.width} tokens comes in parts, but granularity 'prefill' decides from the whole of it: "
                "generate without prefill_chunk_size"
            )
        scope.prompt = _prompt_of(running, scope.mask, rows, tokens, main.device)
        return
    if length is None and reads_texts():
        length = PROMPT
    if length is not None:
        scope.prompt = span(scope.mask, length, rows, tokens, main.device)
    elif cache is not None or arguments.get("use_cache") is True:
        scope.prompt = True


def _prompt_of(running: _Generation, padding: Tensor | None, rows: int, tokens: int, device: torch.device) -> Tensor:
    """Which of a call's tokens are the prompt's real ones, bool `(N, T)`; static caches come with another form of mask."""
    columns = (torch.arange(tokens, device=device) < running.width).expand(rows, tokens)
    if padding is not None:
        return columns & padding
    if running.real is None or rows % len(running.real):
        return columns
    real = running.real.to(device).repeat_interleave(rows // len(running.real), 0)
    return columns & F.pad(real, (0, tokens - running.width))


def _keep(kept: Kept, given: Any, output: Any) -> None:
    """Attach what a call decided to its cache: the one that it was given, or the one that it made."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    cache = cache_in([given, *values])
    if cache is not None:
        keep(cache, kept)


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
        base = torch.arange(running.start, running.start + running.rows) if forced.samples is None else forced.samples
        scope.samples = base.repeat_interleave(rows // len(base)) if rows % len(base) == 0 else None
        scope.start = running.start
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


def _returns_notes(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a call returns what transformers notes inside of branches: by argument, else by configuration."""
    return any(_is_wanted(getattr(model, "config", None), arguments, name) for name in _NOTES)


def _is_wanted(config: Any, arguments: Mapping[str, Any], name: str) -> bool:
    wanted = arguments.get(name)
    if wanted is not None:
        return bool(wanted)
    parts = (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))
    return any(bool(getattr(one, name, False)) for one in (config, *parts))


def samples_in(arguments: Mapping[str, Any]) -> int:
    """Number of samples in a call."""
    main = _first(arguments, (*_INPUTS, *_DECODER_INPUTS))
    if main is not None:
        return len(main)
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
