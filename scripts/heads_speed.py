"""`python -m surgery.scripts.heads_speed`: time of one attention module with half of its heads, against all of them.

The attention of ViT-S (384 channels, 6 heads, 197 tokens), random weights, other heads in every sample and every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import command, show, show_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.timing import Ratio

MODEL = "deit_small_patch16_224"
ACTIVE = 3  # of 6 heads


def measure_heads(size: int, repeats: int, active: int = ACTIVE) -> Ratio:
    """Gated by dense attention at one batch size, called in turns."""
    import torch

    from surgery.heads import ActiveHeads
    from surgery.timing import compare

    attention, example = _attention()
    roles, parameters = _roles(attention, example)
    x = torch.randn(size, *example.shape[1:])
    generator = torch.Generator().manual_seed(size)

    def skipping() -> Tensor:
        order = torch.rand((size, roles.count), generator=generator).argsort(1)
        with ActiveHeads(roles, parameters, order < active):
            made: Tensor = attention(x)
        return made

    with torch.no_grad():
        return compare(skipping, lambda: attention(x), repeats=repeats, warmup=5)


def _attention() -> tuple[nn.Module, Tensor]:
    import timm
    import torch

    model: Any = timm.create_model(MODEL)
    return model.eval().blocks[0].attn, torch.randn(2, 197, 384)


def _roles(attention: nn.Module, example: Tensor) -> tuple[Any, list[Tensor]]:
    import torch

    from surgery.head_finding import find_heads
    from surgery.heads import HeadRoles

    parameters = dict(attention.named_parameters())
    with torch.no_grad():
        roles = find_heads(lambda: attention(example), attention(example), parameters, keep_keys=False)
    assert isinstance(roles, HeadRoles)
    return roles, [parameters[name] for name in roles.names]


@command
def heads_speed(
    timed_batch: options.TimedBatches = None,
    repeats: Annotated[int, typer.Option("--repeats", min=8, help="Timed pairs per batch size.")] = 100,
    threads: options.Threads = 2,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time the attention of ViT-S with half of its heads, other ones in every sample."""
    from surgery.tables import speed_table
    from surgery.timing import conditions

    options.set_up(threads, 0)
    found = {size: measure_heads(size, repeats) for size in timed_batch or (1, 8)}
    if as_json:
        show_json({"conditions": conditions(), "speed": {size: ratio.to_dict() for size, ratio in found.items()}})
    else:
        show(speed_table(found))


if __name__ == "__main__":
    typer.run(heads_speed)
