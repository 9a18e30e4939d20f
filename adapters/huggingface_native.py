"""Gated models as transformers' own checkpoints: `AutoModel….from_pretrained(directory)` gives the gated model.

transformers lets others describe how a model differs from its class, for quantised weights: `config.json` carries a
`quantization_config`, whose method names a registered class, which changes the model on the meta device before weights
are loaded. Gates are such a difference. All of our configuration stands in `quantization_config`; routers and skip paths
are tensors among the others. `import surgery.adapters.huggingface` registers the class.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from surgery.configs import METHOD, Recorded, decode
from surgery.context import state_of
from surgery.copying import align
from surgery.errors import CheckpointError, PlanMismatch, SurgeryError
from surgery.gates import Gate
from surgery.healing import install
from surgery.rewriting import gate_in_place
from surgery.routers import Scorer

logger = logging.getLogger(__name__)


class GatesConfig(QuantizationConfigMixin):
    """The `quantization_config` of a gated model: what `surgery_config.json` holds otherwise."""

    def __init__(self, quant_method: str = METHOD, **content: Any) -> None:
        self.quant_method: Any = quant_method  # an enum where the method is transformers' own
        self.content = content

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {"quant_method": self.quant_method, **self.content}

    def recorded(self) -> Recorded:
        """The content, checked.

        Raises:
            CheckpointError: If it is damaged or of a newer format.
        """
        try:
            return decode(self.content)
        except CheckpointError as error:
            raise CheckpointError(
                f"the quantization_config of this model is damaged ({error}); save it again"
            ) from error


class GatesQuantizer(HfQuantizer):
    """Inserts gates before weights are loaded, and the saved state after it. Nothing is quantised."""

    requires_calibration = False

    def __init__(self, quantization_config: GatesConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config
        self.tensors: Path | None = None

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        recorded = self.config.recorded()
        try:
            gate_in_place(model, recorded.plan)
        except SurgeryError:
            raise
        except Exception as error:  # a plan from elsewhere can be wrong in ways that only tracing finds
            raise PlanMismatch(f"the gates cannot be put into this {type(model).__name__}: {error}") from error
        if recorded.values.get("healing") is not None:
            install(model, recorded.values["healing"])
        keep_routers_in_float32(model)
        if self.tensors is not None:  # one more shard of the checkpoint
            kwargs["checkpoint_files"].append(str(self.tensors))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from surgery.checkpoints import restore

        restore(model, self.config.recorded())
        align(model)
        freeze_backbone(model)
        loaded: Any = model
        loaded.is_quantized = False  # it may be cast, unlike quantised models
        if self.tensors is not None:
            del loaded.hf_quantizer, loaded.config.quantization_config
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """`save_pretrained` writes it."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Skip paths are; routers learn in `surgery.train_routers`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Trainer trains skip paths without an adapter on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """In the executions `cond` and `mask`."""
        return True


def register() -> None:
    """Make transformers know the method `surgery`; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(GatesConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(GatesQuantizer)


def save_pretrained(gated: nn.Module, save: Any, *args: Any, spec: str | None = None, **kwargs: Any) -> Any:
    """Call transformers' `save_pretrained` on a model whose config says what its gates are.

    Args:
        gated: A gated model; its config is as it was afterwards.
        save: `save_pretrained` of the model's own class.
        args: Passed on.
        spec: `MODEL` string of the base.
        kwargs: Passed on.
    """
    from surgery.checkpoints import config_of

    config: Any = gated.config
    method = getattr(getattr(config, "quantization_config", None), "quant_method", METHOD)
    if method != METHOD:
        raise CheckpointError(
            f"the base is quantised ({method}), and a checkpoint of transformers holds one quantization_config; use "
            "surgery.save(gated, directory), which refers to the base"
        )
    was = {name: value for name, value in vars(config).items() if name == "quantization_config"}
    config.quantization_config = GatesConfig(**config_of(gated, state_of(gated), spec, included=True))
    try:
        return save(gated, *args, **kwargs)
    finally:
        del config.quantization_config
        vars(config).update(was)


def load_native(place: Path, *, dtype: torch.dtype | None, device_map: Any) -> nn.Module:
    """The gated model of a native checkpoint, as the class that its config names."""
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    return _from_pretrained(str(place), dtype=dtype or "auto", **options)


def load_streamed(
    spec: str,
    config: Mapping[str, Any],
    tensors: Path,
    *,
    revision: str | None,
    dtype: torch.dtype | None,
    device_map: Any,
) -> nn.Module:
    """Base weights and gates straight to their devices, without a second copy of either.

    Args:
        spec: `MODEL` string of the base.
        config: What `surgery_config.json` holds.
        tensors: `surgery.safetensors`.
        revision: Of the base on the Hub.
        dtype: Of the backbone; None keeps that in which it was saved.
        device_map: As in `from_pretrained`.
    """
    from surgery.adapters.specs import parse_spec

    parsed = parse_spec(spec)
    saved = (config["base"].get("dtypes") or ["float32"])[0]
    quantizer = functools.partial(_streamed, tensors)
    options = {**parsed.without("revision", "pretrained", "class", "mean", "std", "size", "max_length")}
    with _quantizer(quantizer):
        return _from_pretrained(
            parsed.rest,
            wanted=parsed.options.get("class"),
            revision=revision or parsed.options.get("revision"),
            dtype=dtype or getattr(torch, saved),
            device_map=device_map,
            quantization_config=GatesConfig(**config),
            **options,
        )


def keep_routers_in_float32(model: nn.Module) -> None:
    """Tell transformers' loader which tensors keep their dtype whatever the model's is."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, Scorer):
            module.float()
            names.add(name)
    kept: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    model._keep_in_fp32_modules_strict = {*kept, *names}  # type: ignore[assignment]


def freeze_backbone(gated: nn.Module) -> None:
    """Leave gradients to routers and skip paths alone, as in any gated model."""
    own = {id(p) for module in gated.modules() if isinstance(module, Gate) for p in module.parameters()}
    for parameter in gated.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in own)


def _streamed(tensors: Path, config: GatesConfig, **kwargs: Any) -> GatesQuantizer:
    quantizer = GatesQuantizer(config, **kwargs)
    quantizer.tensors = tensors
    return quantizer


@contextmanager
def _quantizer(factory: Any) -> Iterator[None]:
    was = AUTO_QUANTIZER_MAPPING[METHOD]
    AUTO_QUANTIZER_MAPPING[METHOD] = factory
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[METHOD] = was


def _from_pretrained(name: str, *, wanted: str | None = None, revision: str | None = None, **options: Any) -> nn.Module:
    from surgery.adapters.huggingface import class_of

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision)
        model: nn.Module = class_of(name, config, wanted).from_pretrained(name, revision=revision, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"{name} cannot be loaded: {error}") from error
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{name}: its weights do not fit: {error}") from error
    return model.eval()
