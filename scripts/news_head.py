"""A classifier of news on frozen MiniLM features: `python -m surgery.scripts.news_head --shared ../shared --out out/agnews`.

The encoder of ../shared/weights/minilm-sst2 stays as it is. Its head (transformers' pooler and classifier, a tanh layer and a
linear one on the first token) is trained anew on the labels of AG News, with a tenth of the training texts kept back to
stop by. The result is an ordinary transformers directory that `surgery convert hf:out/agnews` takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

LABELS = ("World", "Sports", "Business", "Sci/Tech")
PASSES = 60


def main(
    shared: Annotated[Path, typer.Option(help="Directory with weights/ and data/.")] = Path("../shared"),
    out: Annotated[Path, typer.Option(help="Where to write the model.")] = Path("out/agnews"),
    limit: Annotated[int | None, typer.Option(help="Use at most that many training texts.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Train the head and write the model."""
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    source = shared / "weights" / "minilm-sst2"
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        source,
        dtype=torch.float32,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        ignore_mismatched_sizes=True,
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    table = pq.read_table(shared / "data/agnews/train.parquet")
    texts, labels = table["text"].to_pylist()[:limit], torch.tensor(table["label"].to_pylist()[:limit])
    states = first_states(model.bert, tokenizer, texts)
    accuracy = train_head(model, states, labels)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    typer.echo(f"{accuracy:.4f} on {len(texts) // 10} texts that were kept back; written to {out}")


def first_states(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The last hidden state of every text's first token, `(N, C)`."""
    import torch

    states = torch.empty(len(texts), encoder.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=128, return_tensors="pt"
            )
            states[rows] = encoder(**batch).last_hidden_state[:, 0]
    return states


def train_head(model: Any, states: Tensor, labels: Tensor) -> float:
    """Train pooler and classifier on first-token states; keeps the weights that were best on what is kept back, and
    returns their accuracy there.
    """
    import torch
    from torch.nn import functional as F

    kept = len(states) // 10
    train, held = slice(kept, None), slice(0, kept)
    head: nn.ModuleList = torch.nn.ModuleList([model.bert.pooler, model.classifier])
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    best, weights = 0.0, {}
    for _ in range(PASSES):
        for rows in torch.randperm(len(states) - kept).split(256):
            x, y = states[train][rows], labels[train][rows]
            pooled = F.dropout(head[0](x[:, None]), 0.2)
            loss = F.cross_entropy(head[1](pooled), y, label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            right = head[1](head[0](states[held][:, None])).argmax(1) == labels[held]
        if (accuracy := float(right.float().mean())) > best:
            best, weights = accuracy, {k: v.clone() for k, v in head.state_dict().items()}
    head.load_state_dict(weights)
    return best


if __name__ == "__main__":
    typer.run(main)
