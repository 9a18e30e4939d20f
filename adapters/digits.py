"""scikit-learn's bundled handwritten digits: a data set that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from surgery.adapters.base import library
from surgery.errors import DataError

TEST_SIZE = 500


def digits(split: str = "train", *, size: int = 8) -> tuple[Tensor, Tensor]:
    """1,297 training or 500 test digits; the split is stratified and always the same.

    Args:
        split: `train` or `test`.
        size: Rows and columns; other than 8 is bilinear interpolation.

    Returns:
        Images `(N, 1, size, size)` in [0, 1] and labels `(N,)`.

    Raises:
        DataError: If there is no such split.
        MissingDependency: If scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"digits has the splits train and test, got {split!r}")
    if size < 1:
        raise DataError(f"digits: size must be at least 1, got {size}")
    install = "bypass-surgery[data]"
    bunch = library("sklearn.datasets", install).load_digits()
    indices = library("sklearn.model_selection", install).train_test_split(
        list(range(len(bunch.target))), test_size=TEST_SIZE, stratify=bunch.target, random_state=0
    )
    chosen = torch.tensor(sorted(indices[split == "test"]))
    images = torch.from_numpy(bunch.images)[chosen].float()[:, None] / 16
    if size != 8:
        images = functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return images, torch.from_numpy(bunch.target)[chosen].long()
