"""`python -m surgery.scripts.decoder_speed`: what skipping is worth in a decoder, on random weights with forced decisions.

    prefill 50 %    half of the query tokens and half of the MLP tokens of one layer, 512 tokens
    prefill open    every token
    decode closed   one token after 512, attention's query side and MLP left out; keys and values are written
    decode open     the same with nothing left out
    generate 60 %   tokens per second of greedy `generate` on 12 layers, 60 % of all decisions open
    8 texts         the same for a batch of 8, decided per token, and once per text from its prompt (prefill)

Times are those of the gated model by those of the dense one, called in turns in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgery.scripts import options
from surgery.scripts.running import command, note, show, show_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery.timing import Ratio

LAYER: dict[str, Any] = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
}
WHOLE: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
}
PAST, NEW, TEXTS = 512, 48, 8


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison: the gated model's time as a multiple of the dense one's."""

    what: str
    median: float
    q1: float
    q3: float
    total: float
    dense_ms: float
    limit: float

    @classmethod
    def of(cls, what: str, ratio: Ratio, limit: float) -> Row:
        """A row of a timed comparison."""
        return cls(what, ratio.median, ratio.q1, ratio.q3, ratio.total, ratio.b_ms, limit)


def build(
    sizes: dict[str, Any],
    layers: int,
    vocabulary: int,
    *,
    granularity: Literal["token", "prefill"] = "token",
    routers: Any = "own",
) -> tuple[Any, Any]:
    """A random Llama and its gated copy, which skips by identity."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from surgery import find_sites, insert_gates

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=vocabulary)).eval()
    ids = torch.randint(3, vocabulary, (2, 16))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model, insert_gates(
        model, find_sites(model, example).plan(skip="identity", granularity=granularity, routers=routers)
    )


def layer_rows(repeats: int) -> Iterator[Row]:
    """Prefill and decode of one layer."""
    import torch

    from surgery import force
    from surgery.context import state_of
    from surgery.timing import compare

    model, gated = build(LAYER, 1, 64)
    names = state_of(gated).names

    def skipping(run: Callable[[], Any], decisions: Tensor) -> Callable[[], Any]:
        def call() -> None:
            with force(gated, dict.fromkeys(names, decisions)):
                run()

        return call

    half = torch.zeros(1, PAST, dtype=torch.bool)
    half[0, torch.randperm(PAST)[: PAST // 2]] = True
    dense, mine = prefill(model), prefill(gated)
    yield Row.of("prefill 50 %", compare(skipping(mine, half), dense, repeats=repeats), 0.62)
    everything = torch.ones_like(half)
    yield Row.of("prefill open", compare(skipping(mine, everything), dense, repeats=repeats), 1.05)
    dense, mine = decode(model), decode(gated)
    for what, value, limit in (("decode closed", False, 0.35), ("decode open", True, 1.10)):
        one = torch.full((1, 1), value)
        yield Row.of(what, compare(skipping(mine, one), dense, repeats=10 * repeats), limit)


def prefill(model: Any) -> Callable[[], Any]:
    """Runs the model's first layer on 512 tokens."""
    import torch

    x = torch.randn(1, PAST, LAYER["hidden_size"])
    positions = model.model.rotary_emb(x, torch.arange(PAST)[None])
    return lambda: model.model.layers[0](x, position_embeddings=positions, attention_mask=None)


def decode(model: Any) -> Callable[[], Any]:
    """Runs the model's first layer on one token after 512 others, whose keys and values are cached."""
    import inspect

    import torch
    from transformers import DynamicCache
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    name = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
    layer, cache = model.model.layers[0], DynamicCache()
    x = torch.randn(1, PAST, LAYER["hidden_size"])
    with torch.no_grad():
        positions = model.model.rotary_emb(x, torch.arange(PAST)[None])
        layer(x, position_embeddings=positions, attention_mask=None, **{name: cache})
    one = torch.randn(1, 1, LAYER["hidden_size"])
    position = model.model.rotary_emb(one, torch.tensor([[PAST]]))

    def run() -> None:
        layer(one, position_embeddings=position, attention_mask=None, **{name: cache})
        cache.crop(-1)

    return run


def generate_rows(repeats: int) -> Iterator[Row]:
    """Greedy generation from prompts of 16 tokens."""
    import torch

    from surgery import force
    from surgery.timing import compare

    whole = build(WHOLE, 12, 2048)
    once = build(WHOLE, 12, 2048, granularity="prefill")
    for what, (model, gated), texts, limit in (
        ("generate 60 %", whole, 1, 1 / 1.35),
        ("8 texts, per token", whole, TEXTS, math.nan),
        ("8 texts, prefill", once, TEXTS, math.nan),
    ):
        ids = torch.randint(3, 2048, (texts, 16))

        def write(model: nn.Module, ids: Tensor = ids) -> None:
            model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

        def skipping(gated: nn.Module = gated, write: Callable[..., None] = write) -> None:
            with force(gated, 0.6, seed=0):
                write(gated)

        def dense(model: nn.Module = model, write: Callable[..., None] = write) -> None:
            write(model)

        yield Row.of(what, compare(skipping, dense, repeats=repeats, warmup=1), limit)


@command
def decoder_speed(
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed pairs; ten times as many for decoding.")] = 15,
    threads: options.Threads = 2,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time a random decoder with decisions drawn by hand, against the dense one."""
    from surgery.tables import rows_table
    from surgery.timing import conditions

    options.set_up(threads, 0)
    rows = []
    for row in (*layer_rows(repeats), *generate_rows(repeats)):
        rows.append(row)
        note(row.what)
    here = conditions()
    if as_json:
        show_json({"conditions": here, "rows": [asdict(row) for row in rows]})
    else:
        show(rows_table(", ".join(f"{key} {value}" for key, value in here.items()), rows))


if __name__ == "__main__":
    typer.run(decoder_speed)
