"""A lab page: can harm be predicted per sample, from pooled features or from what a linear probe is sure of (a lens)?

    python -m surgery.scripts.lens_probe python:scripts/networks.py:resnet20 --data ../shared/data/cifar10/train.parquet

At every site a ridge regression of the dense logits on the router's pooled features is fitted on half of the samples; its sorted
logits, largest probabilities, margin and entropy are the lens features (Belrose et al. 2023, tuned lens). Of the other half, 60 %
train a small network each to predict the log of a label, and the correlation is measured on the rest. Labels are the KL
divergence that skipping the site alone causes, and first-order harm.

Axis letters: `N` samples, `F` features, `K` classes.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor, nn

Label = dict[str, Tensor]


def main(
    model: Annotated[str, typer.Argument(help="MODEL: a classifier of images.")],
    data: Annotated[str, typer.Option(help="Training data.")],
    limit: Annotated[int, typer.Option(help="Samples.")] = 3000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
) -> None:
    """Print correlations with log harm on samples that nothing was fitted on."""
    from surgery.adapters import load_data, load_model

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    loaded = load_model(model)
    rows = load_data(data, loaded, split="train", batch_size=100, limit=limit, seed=seed, shuffle=True, augment=True)
    pooled, kl, first_order, dense = labels(loaded.model, list(rows))
    count = len(dense)
    fit, train = slice(0, count // 2), slice(count // 2, count // 2 + 6 * (count - count // 2) // 10)
    held = slice(train.stop, count)
    typer.echo(
        "| site | KL: pooled | KL: lens | KL: both | first order: pooled | first order: lens | first order: both |"
    )
    typer.echo("|---|---|---|---|---|---|---|")
    found = []
    for name, features in pooled.items():
        lens = lens_of(ridge(features[fit], dense[fit], features))
        inputs = (features, lens, torch.cat((features, lens), 1))
        found.append(
            [predicted(x, y[name].clamp_min(1e-7).log(), train, held) for y in (kl, first_order) for x in inputs]
        )
        typer.echo(f"| {name} | " + " | ".join(f"{value:.2f}" for value in found[-1]) + " |")
    typer.echo("| mean | " + " | ".join(f"{value:.2f}" for value in torch.tensor(found).mean(0).tolist()) + " |")


def labels(model: nn.Module, data: list[object]) -> tuple[Label, Label, Label, Tensor]:
    """Pooled features `(N, F)`, KL and first-order harm `(N,)` by site, and the dense logits `(N, K)`."""
    import surgery
    from surgery.calling import as_batch, call, read_output
    from surgery.context import state_of
    from surgery.costs import place
    from surgery.harm import label_harm
    from surgery.objectives import divergence
    from surgery.policies import constant, decided

    batches = [as_batch(one) for one in data]
    sites = surgery.find_sites(model, batches[0].args[0][:8])
    gated = surgery.insert_gates(model, sites.plan(granularity="sample"))
    surgery.fit_skip_paths(gated, batches[:5])
    names = state_of(gated).units
    parts: list[dict[str, list[Tensor]]] = [{name: [] for name in names} for _ in range(3)]
    dense = []
    for one in batches:
        batch = place(one, gated)
        for name, label in label_harm(gated, batch).items():
            parts[0][name].append(label.features.float())
            parts[2][name].append(label.harm.float())
        with torch.no_grad():
            dense.append(read_output(call(model, batch)).float())
            for name in names:
                with decided(gated, constant([other for other in names if other != name])):
                    parts[1][name].append(divergence(read_output(call(gated, batch)), dense[-1]))
    pooled, kl, first_order = ({name: torch.cat(values) for name, values in part.items()} for part in parts)
    return pooled, kl, first_order, torch.cat(dense)


def ridge(x: Tensor, y: Tensor, every: Tensor, strength: float = 1e-2) -> Tensor:
    """Prediction of `y` `(M, K)` for `every` `(N, F)`, fitted on `x` `(M, F)`."""
    mean, scale = x.mean(0), x.std(0) + 1e-6

    def standardised(value: Tensor) -> Tensor:
        return torch.cat(((value - mean) / scale, torch.ones(len(value), 1)), 1).double()

    z = standardised(x)
    gram = z.T @ z / len(z) + strength * torch.eye(z.shape[1], dtype=torch.float64)
    return (standardised(every) @ torch.linalg.solve(gram, z.T @ y.double() / len(z))).float()


def lens_of(logits: Tensor) -> Tensor:
    """Sorted logits, three largest probabilities, margin, entropy: `(N, K)` -> `(N, K + 5)`."""
    p = logits.softmax(-1)
    top = p.topk(3, -1).values
    entropy = -(p * p.clamp_min(1e-9).log()).sum(-1, keepdim=True)
    return torch.cat((logits.sort(-1, descending=True).values, top, top[:, :1] - top[:, 1:2], entropy), 1)


def predicted(x: Tensor, y: Tensor, train: slice, held: slice) -> float:
    """Held-out correlation of a network with one hidden layer of 16, the size of a router."""
    torch.manual_seed(0)
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-6)
    y = (y - y[train].mean()) / y[train].std()
    network = nn.Sequential(nn.Linear(x.shape[1], 16), nn.GELU(), nn.Linear(16, 1))
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2, weight_decay=0.1)
    for _ in range(150):
        loss = (network(x[train]).squeeze(1) - y[train]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        both = torch.stack((network(x[held]).squeeze(1), y[held]))
    return float(torch.corrcoef(both)[0, 1])


if __name__ == "__main__":
    typer.run(main)
