"""How a dataset's row becomes the keyword arguments of a transformers model.

Axis letters: `N` samples, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.adapters.base import Row
from surgery.adapters.huggingface_inputs import forward_names, modalities
from surgery.adapters.images import ImagePreprocess, to_pil
from surgery.adapters.vocabulary import Vocabulary, writes
from surgery.errors import DataError

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


@dataclass(frozen=True)
class HuggingFacePreprocess:
    """One row through the model's own tokenizer, image processor or feature extractor."""

    needs: tuple[str, ...]
    names: tuple[str, ...]
    tokenizer: Any
    image_processor: Any
    feature_extractor: Any
    max_length: int
    text_keys: ClassVar[tuple[str, ...]] = TEXT_KEYS
    """What holds one entry per token of a sample."""

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Any, image_processor: Any, feature_extractor: Any, max_length: int
    ) -> HuggingFacePreprocess:
        """For one model."""
        needs = tuple(one for one in modalities(model) if one != "decoder_input_ids")
        return cls(needs, forward_names(model), tokenizer, image_processor, feature_extractor, max_length)

    def __call__(self, row: Row) -> dict[str, Any]:
        """Keyword arguments without the batch axis; tokens are lists, padded later."""
        sample: dict[str, Any] = {}
        if "text" in self.needs:
            sample |= self._text(row)
        if "image" in self.needs:
            sample |= self._image(row)
        if "audio" in self.needs:
            sample |= self._audio(row)
        sample = {name: value for name, value in sample.items() if name in self.names}
        if "target" in row and "decoder_input_ids" in self.names and self.tokenizer is not None:
            target = self.tokenizer(text_target=str(row["target"]), truncation=True, max_length=self.max_length)
            sample["decoder_input_ids"] = list(target["input_ids"])
        return sample

    def _text(self, row: Row) -> Mapping[str, Any]:
        if self.tokenizer is None:
            raise DataError(
                "the model has no tokenizer, so text cannot be read: save one beside it "
                "(tokenizer.save_pretrained(directory)) or pass batches of input_ids"
            )
        text, pair = row["text"], row.get("pair")
        if not isinstance(text, str) or not (pair is None or isinstance(pair, str)):
            raise DataError(f"expected text, got {type(text).__name__}" + ("" if pair is None else " and a second one"))
        return self.tokenizer(text, pair, truncation=True, max_length=self.max_length)

    def _image(self, row: Row) -> dict[str, Any]:
        if isinstance(self.image_processor, ImagePreprocess):
            return {"pixel_values": self.image_processor(row)}
        values = self.image_processor(to_pil(row["image"]), return_tensors="pt")
        return {name: value[0] for name, value in values.items()}

    def _audio(self, row: Row) -> dict[str, Any]:
        if self.feature_extractor is None:
            raise DataError("the model has no feature extractor (preprocessor_config.json), so sound cannot be read")
        audio = row["audio"]
        rate = None
        if isinstance(audio, Mapping):
            audio, rate = audio["array"], audio.get("sampling_rate")
        values = self.feature_extractor(audio, sampling_rate=rate, return_tensors="pt")
        return {name: value[0] for name, value in values.items()}


@dataclass(frozen=True)
class HuggingFaceCollate:
    """Pad to the longest of the batch, stack, add labels."""

    tokenizer: Any
    max_length: int
    decodes: bool
    right: bool
    vocabulary: Vocabulary | None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, max_length: int) -> HuggingFaceCollate:
        """For one model."""
        needs = modalities(model)
        decodes = "decoder_input_ids" in needs
        # their tokenizers pad on the left, for `generate`; a plain forward counts positions from the first column
        right = writes(model)
        return cls(tokenizer, max_length, decodes, right, Vocabulary.of(model) if decodes else None)

    def __call__(self, samples: Sequence[Mapping[str, Any]], labels: Tensor | None) -> dict[str, Any]:
        """Keyword arguments, `labels` among them where there are some."""
        batch: dict[str, Any] = {}
        text = [{name: sample[name] for name in TEXT_KEYS if name in sample} for sample in samples]
        if "input_ids" in samples[0]:
            # models whose tokenizer gives no mask (SigLIP) were trained on texts padded to full length
            full = "attention_mask" not in self.tokenizer.model_input_names
            padding: dict[str, Any] = {"padding": "max_length" if full else True}
            if full:
                padding["max_length"] = self.max_length
            if self.right:
                padding["padding_side"] = "right"
            batch |= self.tokenizer.pad(text, return_tensors="pt", **padding)
        for name in samples[0]:
            if name not in batch and name != "decoder_input_ids":
                batch[name] = _stack(name, [torch.as_tensor(sample[name]) for sample in samples])
        if self.decodes:
            batch["decoder_input_ids"] = self._targets(samples)
        if labels is not None:
            batch["labels"] = labels
        return batch

    def _targets(self, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """What the decoder reads: its start token, then the target but for its last token."""
        assert self.vocabulary is not None
        rows = [list(sample.get("decoder_input_ids", ()))[:-1] for sample in samples]
        longest = max(map(len, rows))
        start, pad = self.vocabulary.decoder_start, self.vocabulary.pad
        return torch.tensor([[start, *row, *[pad] * (longest - len(row))] for row in rows])


def _stack(name: str, values: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) == 1:
        return torch.stack(list(values))
    if all(value.dim() == 1 for value in values):  # waveforms and their masks
        return nn.utils.rnn.pad_sequence(list(values), batch_first=True)
    raise DataError(
        f"{name} of one batch has different shapes: {', '.join(map(str, shapes[:4]))}; use batch_size=1 or give ?size=…"
    )
