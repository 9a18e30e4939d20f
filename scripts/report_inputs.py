"""The easiest and the hardest inputs of a report: images with maps of patches, texts with a colour per token."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.adapters import Loaded
from surgery.adapters.images import to_pil
from surgery.audits import Observed
from surgery.scripts.report_measuring import Subject
from surgery.scripts.report_page import data_uri
from surgery.tables import percent

SHOWN = 12
TEXTS = 8


def inputs_of(subject: Subject, seen: Observed, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Easiest and hardest inputs: images, or texts with a colour per token."""
    order = seen.costs.argsort().tolist()
    known = subject.loaded.label_names
    image = subject.rows.columns.get("image")
    if not texts and image is None:
        return []
    count = TEXTS if texts else SHOWN
    result = []
    for title, chosen in (("Easiest inputs", order[:count]), ("Hardest inputs", order[::-1][:count])):
        cells = subject.rows.cells(image, chosen) if image is not None else [None] * len(chosen)
        inputs = []
        for index, cell in zip(chosen, cells, strict=True):
            caption = f"cost {percent(float(seen.costs[index]))}"
            for what, values in (("is", seen.labels), ("gated", seen.predicted), ("dense", seen.dense)):
                if values is not None:
                    value = int(values[index])
                    caption += f", {what}: {known[value] if 0 <= value < len(known) else value}"
            one: dict[str, Any] = {"index": index, "caption": caption, "image": "", "map": "", "tokens": []}
            shares = _shares(seen.decisions[index])
            if cell is not None:
                one["image"] = data_uri(_png(to_pil(cell)))
                one["map"] = _patch_map(shares)
            if texts:
                one["tokens"] = _tokens(subject.loaded, texts[index], shares)
            inputs.append(one)
        text = "Those that were given the " + ("least" if title.startswith("E") else "most") + " compute. "
        if texts:
            text += "Each token is coloured by the share of sites that ran for it."
        elif any(one["map"] for one in inputs):
            text += "Below each picture: the share of sites that ran for every patch."
        scale = bool(texts) or any(one["map"] for one in inputs)
        kind = "texts" if texts else "cards"
        result.append({"title": title, "text": text, "kind": kind, "scale": scale, "inputs": inputs})
    return result


def _shares(decisions: Mapping[str, Tensor]) -> list[float]:
    """Share of the sites that ran, for every position of one input (one number where whole inputs are decided)."""
    if not decisions:
        return [1.0]
    longest = max(len(one) for one in decisions.values())
    wide = [one.float() if len(one) == longest else one.float().mean().expand(longest) for one in decisions.values()]
    shares: list[float] = torch.stack(wide).mean(0).tolist()
    return shares


def _patch_map(shares: Sequence[float]) -> str:
    """A picture with one pixel a patch, or "" where positions are no square of patches (with or without a class token)."""
    from PIL import Image

    for lead in (0, 1):
        side = math.isqrt(max(len(shares) - lead, 0))
        if side > 1 and side * side == len(shares) - lead:
            picture = Image.new("RGB", (side, side))
            picture.putdata([_colour(share) for share in shares[lead:]])
            return data_uri(_png(picture.resize((16 * side, 16 * side), Image.Resampling.NEAREST)))
    return ""


def _tokens(loaded: Loaded, text: str, shares: Sequence[float]) -> list[dict[str, str]]:
    ids = loaded.preprocess({"text": text})["input_ids"]
    words = loaded.tokenizer.convert_ids_to_tokens(list(ids))
    if len(shares) != len(words):
        shares = [sum(shares) / len(shares)] * len(words)
    found = []
    for word, share in zip(words, shares, strict=True):
        colour, ink = viridis(share)
        shown = word.replace("Ġ", "").replace("▁", "") or word
        found.append({"text": shown, "colour": colour, "ink": ink, "title": f"{percent(share, 0)} of sites ran"})
    return found


def _colour(share: float) -> tuple[int, int, int]:
    from matplotlib import colormaps

    red, green, blue, _ = colormaps["viridis"](share)
    return round(255 * red), round(255 * green), round(255 * blue)


def viridis(share: float) -> tuple[str, str]:
    """Background and a text colour that can be read on it."""
    red, green, blue = _colour(share)
    dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 120
    return f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#000000"


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.thumbnail((224, 224))
    picture.save(stream, "PNG")
    return stream.getvalue()
