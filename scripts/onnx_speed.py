"""`python -m surgery.scripts.onnx_speed`: what an exported gated model takes in ONNX Runtime, against the dense one.

Random weights and routers, one sample per call, one decision per sample and site. Every router's offset is set so that
it keeps 62 % of the calibration images; those that are timed are others, drawn in the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.scripts import options
from surgery.scripts.running import command, note, show, show_json

if TYPE_CHECKING:
    from torch import Tensor, nn

RATE = 0.62
LIMIT = 0.70
NETWORKS = ("deit_small_patch16_224", "resnet50")


def images(count: int, seed: int) -> Tensor:
    """`(N, 3, 224, 224)`: smooth noise whose grain, contrast and colour differ from one image to the next."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        grain = int(torch.randint(2, 57, (1,), generator=generator))
        contrast = 0.3 + 1.2 * torch.rand(1, generator=generator)
        colour = 0.7 * torch.randn(1, 3, 1, 1, generator=generator)
        noise = torch.randn(1, 3, grain, grain, generator=generator)
        made.append(contrast * F.interpolate(noise, size=224, mode="bilinear", align_corners=False) + colour)
    return torch.cat(made)


def gate(name: str, seed: int, count: int = 48) -> tuple[nn.Module, nn.Module]:
    """A dense network with random weights, and its gated copy: `(dense, gated)`."""
    import timm
    import torch

    import surgery
    from surgery.context import handled, state_of

    torch.manual_seed(seed)
    more: dict[str, Any] = (
        {"zero_init_last": False} if "resnet" in name else {}
    )  # else every branch of a new ResNet gives 0
    dense = timm.create_model(name, pretrained=False, **more).eval()
    known = images(count, seed)
    gated = surgery.insert_gates(dense, surgery.find_sites(dense, known[:2]).plan(granularity="sample"))
    state_of(gated).threshold = 0.0

    def settle(one: Any, branch: Any, left: Any, residual: Tensor, inputs: Any) -> Any:
        router = one.router
        pooled = router.pool(residual)
        router.standardise(pooled)
        for parameter in router.parameters():
            parameter.normal_(std=0.3)
        one.offset = float(router(residual).quantile(1 - RATE))
        return one.skip(branch, left, residual, inputs, router(residual) > one.offset)

    with torch.no_grad(), handled(gated, settle):
        gated(known)
    return dense, gated


def measure(name: str, threads: int, repeats: int, seed: int) -> dict[str, Any]:
    """Export both, check that they agree with torch, time them side by side."""
    import torch

    import surgery
    from surgery.context import state_of
    from surgery.exporting import export
    from surgery.timing import compare

    dense, gated = gate(name, seed)
    inputs = list(images(repeats, seed + 1).split(1))
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        written = export(gated, place / "gated.onnx", inputs[0], execution="cond", decisions=True)
        note(f"{name}: written, {written.bytes / 1e6:.1f} MB")
        with torch.no_grad():
            torch.onnx.export(dense, (inputs[0],), place / "dense.onnx", dynamo=True, input_names=["x"], verbose=False)
        sessions = {key: _session(place / f"{key}.onnx", threads) for key in ("gated", "dense")}
        entry = sessions["gated"].get_inputs()[0].name
        gaps, active = [], []
        for x in inputs:
            output, *decisions = sessions["gated"].run(None, {entry: x.numpy()})
            rates = {
                n.removeprefix("decisions."): float(d.mean())
                for n, d in zip(written.outputs[1:], decisions, strict=True)
            }
            with torch.no_grad(), surgery.execution(gated, "cond"):
                expected = gated(x)
            gaps.append(float((torch.from_numpy(output) - expected).abs().max() / expected.abs().max()))
            active.append(rates)
        ratio = compare(
            _steps(sessions["gated"], entry, inputs), _steps(sessions["dense"], "x", inputs), repeats=repeats
        )
    mean = {site: sum(rates[site] for rates in active) / len(active) for site in active[0]}
    return {
        "network": name,
        "submodules": sum(mean.values()) / len(mean),
        "varying": sum(0 < rate < 1 for rate in mean.values()),
        "sites": len(mean),
        "policies": len({tuple(rates.values()) for rates in active}),
        "flops": state_of(gated).costs.cost(mean),
        "difference": max(gaps),
        "dense_mb": sum(p.numel() for p in dense.parameters()) * 4e-6,
        "file_mb": written.bytes * 1e-6,
        "ratio": ratio.to_dict(),
        "limit": LIMIT,
    }


@command
def onnx_speed(
    only: Annotated[list[str] | None, typer.Option("--only", help="Networks of timm; repeatable.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed pairs, each on another image.")] = 100,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of ONNX Runtime.")] = 1,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time exported gated networks against exported dense ones in ONNX Runtime."""
    from rich.table import Table

    from surgery.timing import conditions

    rows = [measure(name, threads, repeats, seed) for name in only or NETWORKS]
    here = {**conditions(), "threads": threads, "onnxruntime": _version()}
    if as_json:
        show_json({"rows": rows, "conditions": here})
        return
    table = Table(
        "network", "submodules", "FLOPs", "time, median [quartiles]", "all time", "limit", "dense ms", "differs"
    )
    for row in rows:
        ratio = row["ratio"]
        table.add_row(
            row["network"],
            f"{row['submodules']:.3f}",
            f"{row['flops']:.3f}",
            f"{ratio['median']:.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]",
            f"{ratio['total']:.3f}",
            f"{row['limit']:.2f}",
            f"{ratio['b_ms']:.1f}",
            f"{row['difference']:.1e}",
        )
    show(table)
    note(", ".join(f"{key} {value}" for key, value in here.items()))


def _session(path: Path, threads: int) -> Any:
    import onnxruntime

    asked = onnxruntime.SessionOptions()
    asked.intra_op_num_threads, asked.inter_op_num_threads = threads, 1
    asked.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), asked, providers=["CPUExecutionProvider"])


def _steps(session: Any, entry: str, inputs: list[Tensor]) -> Callable[[], object]:
    """Run on the next image each time, so that both sessions see the same ones in the same order."""
    stream: Iterator[dict[str, Any]] = cycle([{entry: x.numpy()} for x in inputs])
    return lambda: session.run(None, next(stream))


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


if __name__ == "__main__":
    typer.run(onnx_speed)
