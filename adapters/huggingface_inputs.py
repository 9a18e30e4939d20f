"""Made-up inputs for transformers models: what they are called with, of the right shapes and value ranges.

Axis letters: `N` samples, `T` tokens or time steps, `C` channels.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapters.huggingface_files import local_image_processor, local_tokenizer
from surgery.adapters.images import coloured_noise, natural_images
from surgery.adapters.vocabulary import Vocabulary, writes
from surgery.calling import Batch, device_of, evaluating
from surgery.errors import DataError

logger = logging.getLogger(__name__)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of the model's `forward`."""
    return tuple(inspect.signature(type(model).forward).parameters)[1:]


def modalities(model: nn.Module) -> tuple[str, ...]:
    """Which of text, image and audio the model is called with, and `decoder_input_ids` where it needs these.

    Raises:
        DataError: If its main input is of another kind.
    """
    names = forward_names(model)
    # two towers, as in CLIP; in models that write text about pictures the picture is optional
    if {"input_ids", "pixel_values"} <= set(names) and hasattr(model, "get_text_features"):
        return ("text", "image")
    main = str(getattr(model, "main_input_name", "input_ids"))
    kinds = {"input_ids": "text", "pixel_values": "image", "input_values": "audio", "input_features": "audio"}
    if main not in kinds:
        raise DataError(
            f"{type(model).__name__} is called with {main!r}, which is not text, image or audio: "
            "pass example=<one batch> or data=<a loader>"
        )
    # heads that classify make the decoder's input from the encoder's
    own = any(word in type(model).__name__ for word in ("Classification", "QuestionAnswering"))
    decodes = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names and not own
    return (kinds[main], "decoder_input_ids") if decodes else (kinds[main],)


def random_batch(
    model: nn.Module, size: int, seed: int, *, length: int, varied: bool = False, generate: bool = False
) -> Batch:
    """One made-up batch on the CPU.

    Args:
        model: A transformers model.
        size: Number of samples.
        seed: The same seed gives the same batch.
        length: Longest text in tokens, where the model can read as many.
        varied: Texts of all lengths; else only the last row is padded.
        generate: Let language models write the text.
    """
    needs = modalities(model)
    generator = torch.Generator().manual_seed(seed)
    kwargs: dict[str, Any] = {}
    if "text" in needs:
        length = min(length, text_limit(model))
        written = write(model, size, seed, length) if generate and writes(model) else None
        kwargs |= written if written is not None else random_text(model, size, length, generator, varied=varied)
    if "image" in needs:
        kwargs["pixel_values"] = random_images(model, size, seed)
    if "audio" in needs:
        kwargs |= random_sound(model, size, generator)
    if "decoder_input_ids" in needs:
        vocabulary = Vocabulary.of(model)
        tokens = vocabulary.draw((size, min(8, length)), generator)
        tokens[:, 0] = vocabulary.decoder_start
        kwargs["decoder_input_ids"] = tokens
    return Batch((), kwargs)


def text_limit(model: nn.Module, tokenizer: Any = None) -> int:
    """The longest text that the model can read, in tokens; 512 where nothing limits it."""
    config = text_config(model)
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    limits = [getattr(config, name, None) for name in names]
    limit = min([value for value in limits if isinstance(value, int) and value > 0], default=512)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from padding_idx + 1
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    longest = getattr(tokenizer, "model_max_length", None)
    return min(limit, longest) if isinstance(longest, int) else min(limit, 4096)


def text_config(model: nn.Module) -> Any:
    """The part of the config that describes the text tower."""
    config: Any = model.config
    return getattr(config, "text_config", None) or config.get_text_config()


def random_text(
    model: nn.Module, size: int, length: int, generator: torch.Generator, *, varied: bool
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and, where the tokenizer would give them, `token_type_ids`."""
    vocabulary = Vocabulary.of(model)
    first, last = vocabulary.first, vocabulary.last
    if length < len(first) + len(last) + 1:
        first, last = (), ()
    shortest = min(length, len(first) + len(last) + (4 if varied else max(1, length // 2)))
    if varied:
        lengths = torch.randint(shortest, length + 1, (size,), generator=generator)
    else:
        lengths = torch.full((size,), length)
        lengths[-1] = shortest if size > 1 else length
    tokens = vocabulary.draw((size, int(lengths.max())), generator)  # N T
    position = torch.arange(tokens.shape[1])
    mask = (position < lengths[:, None]).long()
    for index, token in enumerate(first):
        tokens[:, index] = token
    for index, token in enumerate(reversed(last)):
        tokens[torch.arange(size), lengths - 1 - index] = token
    tokens[mask == 0] = vocabulary.pad
    kwargs = {"input_ids": tokens, "attention_mask": mask}
    names = forward_names(model)
    tokenizer = local_tokenizer(getattr(model.config, "_name_or_path", "") or "")
    two_kinds = (getattr(text_config(model), "type_vocab_size", 0) or 0) > 1
    if two_kinds if tokenizer is None else "token_type_ids" in tokenizer.model_input_names:
        kwargs["token_type_ids"] = torch.zeros_like(tokens)
    return {name: value for name, value in kwargs.items() if name in names}


def write(model: Any, size: int, seed: int, length: int) -> dict[str, Tensor] | None:
    """Text sampled from a language model itself, or None where its `generate` fails."""
    from transformers import GenerationConfig

    vocabulary = Vocabulary.of(model)
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor(vocabulary.first or (0,)).expand(size, -1).clone()
    if not vocabulary.first:  # without a token that starts a text, one word starts it
        start = vocabulary.draw((size, 1), generator)
    ends = vocabulary.ends
    settings = GenerationConfig(
        do_sample=True,
        top_k=50,
        min_new_tokens=min(16, max(1, length - start.shape[1])),
        max_new_tokens=max(1, length - start.shape[1]),
        bos_token_id=vocabulary.first[0] if vocabulary.first else None,
        eos_token_id=list(ends) or None,
        pad_token_id=vocabulary.pad,
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluating(model):
        torch.manual_seed(seed)
        start = start.to(device)
        try:
            tokens = model.generate(start, attention_mask=torch.ones_like(start), generation_config=settings)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            # the synthetic text then is only less natural; the conversion goes on and the log says so
            logger.warning("%s cannot write text (%s); using random tokens", type(model).__name__, error)
            return None
    tokens = tokens.cpu()  # N T
    ended = torch.isin(tokens[:, start.shape[1] :], torch.tensor(ends, dtype=tokens.dtype))
    after = torch.cat([torch.zeros(size, start.shape[1] + 1, dtype=torch.bool), ended.cumsum(1)[:, :-1] > 0], dim=1)
    mask = (~after[:, : tokens.shape[1]]).long()
    return {"input_ids": torch.where(mask == 1, tokens, vocabulary.pad), "attention_mask": mask}


def image_config(model: nn.Module) -> dict[str, Any]:
    """`input_size` `(C, H, W)`, `mean` and `std`: from the config, then the image processor, then ImageNet's."""
    config: Any = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    channels = getattr(vision, "num_channels", 3)
    processor = local_image_processor(getattr(config, "_name_or_path", "") or "")
    size = getattr(vision, "image_size", None)
    if size is None:
        crop = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
        edge = crop.get("shortest_edge") or 224
        size = (crop.get("height") or edge, crop.get("width") or edge)
    sizes = [int(side) for side in (size if isinstance(size, (list, tuple)) else (size,))]
    means = {key: tuple(getattr(processor, f"image_{key}", None) or IMAGENET[key]) for key in ("mean", "std")}
    means = {
        key: values if len(values) == channels else (sum(values) / len(values),) * channels
        for key, values in means.items()
    }
    return {"input_size": (channels, sizes[0], sizes[-1]), **means}


def random_images(model: nn.Module, size: int, seed: int) -> Tensor:
    """`(N, C, H, W)`, or `(N, frames, C, H, W)` for models of video."""
    config = image_config(model)
    frames = getattr(model.config, "num_frames", None)
    count = size * frames if isinstance(frames, int) else size
    images = natural_images(count, config["input_size"], mean=config["mean"], std=config["std"], seed=seed)
    return images.unflatten(0, (size, frames)) if isinstance(frames, int) else images


def random_sound(model: nn.Module, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Waveforms or spectrograms of coloured noise with a loudness that rises and falls."""
    config: Any = model.config
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None and getattr(config, "max_source_positions", None) and model.main_input_name == "input_features":
        channels = getattr(config, "input_channels", None)  # of a stem over (time, bins), which takes the axes swapped
        shape = (size, bins, 2 * config.max_source_positions) if channels is None else (size, 128, bins)
        return {"input_features": coloured_noise(shape, generator, 0.8) * 0.5}
    if bins is not None and getattr(config, "max_length", None) and model.main_input_name == "input_values":
        return {"input_values": coloured_noise((size, config.max_length, bins), generator, 0.8) * 0.5}
    for name in ("feature_projection_input_dim", "input_feat_per_channel"):
        if getattr(config, name, None) and model.main_input_name == "input_features":
            return {"input_features": coloured_noise((size, 128, getattr(config, name)), generator, 0.8)}
    if model.main_input_name == "input_features":
        raise DataError(f"the shape of {type(model).__name__}'s input_features is not known: pass example=<one batch>")

    steps = 8000  # half a second at 16 kHz
    wave = coloured_noise((size, 1, steps), generator, 0.7)[:, 0]
    loudness = coloured_noise((size, 1, steps), generator, 1.5)[:, 0]
    wave = wave * torch.exp(0.7 * loudness)
    wave = (wave - wave.mean(1, keepdim=True)) / wave.std(1, keepdim=True)
    # models with group norm in the first layer were trained without a mask
    if getattr(config, "feat_extract_norm", "group") != "layer" or size == 1:
        return {"input_values": wave}
    mask = torch.ones(size, steps, dtype=torch.long)
    mask[-1, steps // 2 :] = 0
    return {"input_values": wave * mask, "attention_mask": mask}
