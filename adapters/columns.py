"""Which column of a dataset holds what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgery.errors import DataError

ROLES = ("image", "text", "pair", "audio", "value", "target", "label")
IMAGE_NAMES = ("image", "img", "picture", "photo", "pixel_values", "png", "jpg")
AUDIO_NAMES = ("audio", "speech", "sound", "waveform", "array")
VALUE_NAMES = ("inputs", "input", "x", "X", "features", "data", "value", "values")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("question", "passage"),
    ("query", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXT_NAMES = [
    "text",
    "sentence",
    "content",
    "review",
    "document",
    "article",
    "story",
    "prompt",
    "dialogue",
    "tweet",
    "comment",
    "caption",
    "body",
    "description",
    "question",
    "title",
    "instruction",
    "input",
]
LABEL_NAMES = [
    "label",
    "labels",
    "fine_label",
    "target",
    "targets",
    "class",
    "category",
    "y",
    "stars",
    "rating",
    "score",
]
TARGET_NAMES = ["summary", "highlights", "target", "answer", "response", "output", "completion", "sentence", "text"]
MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


def find_columns(
    features: Mapping[str, Any],
    row: Mapping[str, Any],
    needs: Sequence[str],
    given: Mapping[str, str] | None = None,
    *,
    target: bool = False,
    where: str = "the data",
) -> dict[str, str]:
    """Recognise columns by their type first, then by their name and a value.

    Args:
        features: Column name -> its type, as `datasets` writes it.
        row: The first value of each column that is not None, undecoded or decoded.
        needs: Which of image, text, audio must be there; empty for whichever there is.
        given: Roles whose column is already known.
        target: Look for a text that the model should write.
        where: Named in errors.

    Returns:
        Role -> column name.

    Raises:
        DataError: If a needed column is not there, or a given one does not exist.
    """
    found = dict(given or {})
    for role, name in found.items():
        if role not in ROLES:
            raise DataError(f"columns: unknown role {role!r}; there are: {', '.join(ROLES)}")
        if name not in features:
            raise DataError(f"{where} has no column {name!r} (columns[{role!r}]); found: {_describe(features)}")

    free = {name: kind for name, kind in features.items() if name not in found.values()}
    finders: dict[str, Callable[[], str | None]] = {
        "image": lambda: _of_type(free, "Image", IMAGE_NAMES) or _by_value(free, row, IMAGE_NAMES, _is_image),
        "audio": lambda: _of_type(free, "Audio", AUDIO_NAMES) or _by_value(free, row, AUDIO_NAMES, _is_audio),
        "value": lambda: _by_value(free, row, VALUE_NAMES, _is_array),
    }
    if "label" not in found:
        label = _label(free, row)
        if label is not None:
            found["label"] = label
            free.pop(label)
    wanted = needs or ("image", "audio", "value", "text")
    for role in wanted:
        if role not in found and role in finders:
            column = finders[role]()
            if column is not None:
                found[role] = column
                free.pop(column)
        elif role == "text" and "text" not in found:
            found |= _text(free, row)
        if not needs and role in found:
            break
    free = {name: kind for name, kind in free.items() if name not in found.values()}
    if target and "target" not in found:
        column = next((n for n in TARGET_NAMES if n in free and isinstance(row.get(n), str)), None)
        if column is not None:
            found["target"] = column

    missing = [role for role in needs if role not in found]
    if missing or not set(found) & set(wanted):
        raise DataError(
            f"{where}: found no column of {' and no column of '.join(missing) or 'inputs'}; "
            f"columns: {_describe(features)}; call the right one {(missing or ['image, text or value'])[0]}, or in Python pass "
            f"columns={{{(missing or ['image'])[0]!r}: <column>}}"
        )
    return found


def _label(features: Mapping[str, Any], row: Mapping[str, Any]) -> str | None:
    classes = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    for name in LABEL_NAMES:
        if name in classes:
            return name
    for name in LABEL_NAMES:
        # a long text called `target` is what a model should write, not a class
        if name in features and isinstance(row.get(name), (bool, int, float, str)):
            if not (isinstance(row[name], str) and len(row[name].split()) > 4):
                return name
    return classes[0] if classes else None


def _text(features: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    strings = [name for name in features if isinstance(row.get(name), str)]
    for first, second in PAIRS:
        if first in strings and second in strings:
            return {"text": first, "pair": second}
    for name in TEXT_NAMES:
        if name in strings:
            return {"text": name}
    return {"text": strings[0]} if len(strings) == 1 else {}


def _of_type(features: Mapping[str, Any], kind: str, names: Sequence[str]) -> str | None:
    found = [name for name, feature in features.items() if type(feature).__name__ == kind]
    return next((name for name in names if name in found), found[0] if found else None)


def _by_value(
    features: Mapping[str, Any], row: Mapping[str, Any], names: Sequence[str], test: Callable[[Any], bool]
) -> str | None:
    found = [name for name in features if test(row.get(name))]
    return next((name for name in names if name in found), found[0] if found else None)


def _is_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_image(value.get("bytes"))
    return isinstance(value, (bytes, bytearray)) and bytes(value[:4]).startswith(MAGIC)


def _is_audio(value: Any) -> bool:
    return isinstance(value, Mapping) and "array" in value


def _is_array(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
    return hasattr(value, "shape")


def _describe(features: Mapping[str, Any]) -> str:
    def kind(feature: Any) -> str:
        return getattr(feature, "dtype", None) or type(feature).__name__

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in features.items()) or "none"
