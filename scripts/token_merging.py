"""Token merging (Bolya et al. 2023, ToMe) for timm's plain vision transformers: a peer of `surgery compare`.

After the attention of every block the `r` most alike pairs of tokens become one each, by bipartite soft matching on the
keys; attention then counts a merged token as often as it has parts. Nothing is trained.

Axis letters: `N` samples, `T` tokens, `C` channels, `H` heads, `D` head dim.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.copying import share
from surgery.counting import flop_counter
from surgery.errors import BudgetError, UnsupportedModel

NAME = "token merging"
_TRIES = 12


class MergedTokens(nn.Module):
    """A vision transformer that merges `rate` tokens per block, fractions spread over the blocks.

    Args:
        model: As `check` accepts; its weights are shared, it is not changed.
        rate: Tokens that each block merges away, in [0, T / 2].
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        super().__init__()
        self.model = share(model).eval()
        self.rate = rate
        self.keys: Tensor = torch.empty(0)
        blocks: Any = self.model.blocks
        for block in blocks:
            block.attn.qkv.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.keys = output.chunk(3, -1)[1]  # N T H*D

    def forward(self, images: Tensor) -> Tensor:
        """Images as the model takes them -> its logits."""
        model: Any = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))  # N T C
        size = torch.ones_like(x[..., :1])
        for index, block in enumerate(model.blocks):
            merged = math.floor((index + 1) * self.rate) - math.floor(index * self.rate)
            attention = block.attn(block.norm1(x), attn_mask=size.log()[:, None, None, :, 0])
            x = x + block.drop_path1(block.ls1(attention))
            keys = block.attn.k_norm(self.keys.unflatten(-1, (block.attn.num_heads, -1)))  # N T H D
            x, size = merge(x, size, keys.mean(2), merged, model.num_prefix_tokens)
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        x = model.norm(x)
        if model.global_pool == "token":
            return model.forward_head(x)
        start = 0 if model.pool_include_prefix else model.num_prefix_tokens
        mean = (x * size)[:, start:].sum(1) / size[:, start:].sum(1)
        return model.head(model.head_drop(model.fc_norm(mean)))


def merge(x: Tensor, size: Tensor, metric: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The `count` tokens that are most like another one, each merged into it.

    Tokens at even places may be merged into one at an odd place; the first `prefix` (0 or 1) tokens stay.

    Args:
        x: `(N, T, C)`.
        size: How many tokens each one stands for, `(N, T, 1)`.
        metric: By which likeness is judged, `(N, T, D)`.
        count: How many; at most half of the tokens are.
        prefix: 1 if the first one is a class token.

    Returns:
        Tokens `(N, T - count, C)`, weighted means by size, the class token first; and their sizes.
    """
    count = min(count, (x.shape[1] - prefix) // 2)
    if count <= 0:
        return x, size
    metric = F.normalize(metric, dim=-1)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # N T/2 T/2
    if prefix:
        scores[:, 0] = -math.inf
    likeness, partner = scores.max(-1)  # N T/2
    order = likeness.argsort(dim=-1, descending=True)
    going, partner = order[:, :count], partner.gather(1, order[:, :count])
    staying = order[:, count:].sort(1).values  # the class token comes first again

    def merged(value: Tensor) -> Tensor:
        even, odd = value[:, ::2], value[:, 1::2]
        width = value.shape[-1]
        gone = even.gather(1, going[..., None].expand(-1, -1, width))
        odd = odd.scatter_add(1, partner[..., None].expand(-1, -1, width), gone)
        return torch.cat((even.gather(1, staying[..., None].expand(-1, -1, width)), odd), 1)

    sizes = merged(size)
    return merged(x * size) / sizes, sizes


def check(model: nn.Module) -> None:
    """Refuse what token merging is not written for.

    Raises:
        UnsupportedModel: By the name of what it is.
    """
    from timm.models import vision_transformer as timm

    what = type(model).__name__
    if type(model) is not timm.VisionTransformer:
        raise UnsupportedModel(f"token merging is for timm's VisionTransformer; {what} is another network")
    odd = [type(b).__name__ for b in model.blocks if type(b) is not timm.Block or type(b.attn) is not timm.Attention]
    if odd:
        raise UnsupportedModel(f"token merging is for plain blocks and attention; this {what} has {odd[0]}")
    if model.num_prefix_tokens > 1 or model.global_pool not in ("token", "avg") or model.attn_pool is not None:
        raise UnsupportedModel(
            f"token merging is for at most one prefix token and pooling by class token or mean; this {what} has "
            f"{model.num_prefix_tokens} and pools by {model.global_pool or 'nothing'}"
        )
    if "attn_mask" not in inspect.signature(model.blocks[0].attn.forward).parameters:
        raise UnsupportedModel("token merging needs attention that takes attn_mask: pip install -U timm")


def merged_to(model: nn.Module, images: Tensor, dense_flops: float, cost: float) -> tuple[MergedTokens, float]:
    """The transformer that merges as many tokens as bring its cost down to `cost`.

    Args:
        model: The dense model.
        images: One image, `(1, C, H, W)`.
        dense_flops: Of the dense model for it.
        cost: As a fraction of dense.

    Returns:
        It, and the cost it has.

    Raises:
        UnsupportedModel: As `check` does.
        BudgetError: If merging half of the tokens in every block costs more.
    """
    check(model)
    merging = MergedTokens(model, 0.0)
    with torch.no_grad():
        merging(images)
        low, high = 0.0, merging.keys.shape[1] / 2
        least = _cost(merging, images, high) / dense_flops
        if least > cost:
            raise BudgetError(
                f"merging half of the tokens in every block still costs {least:.3f}, more than {cost:.3f}"
            )
        for _ in range(_TRIES):
            middle = (low + high) / 2
            low, high = (middle, high) if _cost(merging, images, middle) / dense_flops > cost else (low, middle)
        return merging, _cost(merging, images, high) / dense_flops


def _cost(merging: MergedTokens, images: Tensor, rate: float) -> float:
    merging.rate = rate
    with flop_counter() as counter:
        merging(images)
    return float(counter.get_total_flops())
