"""`surgery app DIR`: a page on which one moves the budget and sees what runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.errors import MissingDependency, SurgeryError
from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.loading import Machine
from surgery.scripts.running import command

if TYPE_CHECKING:
    from torch import nn

    from surgery.adapters import Loaded

TOP = 5


@command
def app(
    directory: options.DirectoryArgument,
    base: options.Base = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Open a page: an image or a text in, a slider for the budget, what runs and what is skipped along the network."""
    check_address(host, port)
    with waiting("loading the model"):
        gated, loaded = Machine(device, dtype, threads, seed, revision).load_converted(directory, base)
    built = build(gated, loaded, directory.name)
    if as_json:
        typer.echo(f'{{"url": "http://{host}:{port}"}}')
    built.launch(server_name=host, server_port=port, quiet=as_json)


def check_address(host: str, port: int) -> None:
    """Refuse an address on which no page can be served, before the model is loaded.

    Raises:
        SurgeryError: If another program has the port, or the host is none of this machine's.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise SurgeryError(
            f"--host {host} --port {port} cannot be used: {error.strerror or error}; give another"
        ) from error


def build(gated: nn.Module, loaded: Loaded, name: str) -> Any:
    """The page as `gradio.Blocks`, not yet launched.

    Raises:
        MissingDependency: If gradio is not installed.
        SurgeryError: If the model reads neither images nor texts, or was never calibrated.
    """
    from surgery.budgets import budget_range
    from surgery.context import state_of

    try:
        import gradio
    except ImportError as error:
        raise MissingDependency('the page needs gradio: pip install "bypass-surgery[app]"') from error
    needs = tuple(loaded.preprocess.needs)
    either = ("text",) if loaded.tokenizer is not None else ("image",)  # no needs means whatever there is
    kind = next((one for one in needs or either if one in ("image", "text")), None)
    if kind is None:
        raise SurgeryError(f"the page takes an image or a text; this model reads {', '.join(needs)}")
    low, high = budget_range(gated)
    if low >= 1:
        raise SurgeryError("this model was never calibrated, so there is no budget to move; run surgery convert")
    budget = min(max(state_of(gated).budget or high, low), high)
    with gradio.Blocks(title=f"{name}: what is skipped") as page:
        gradio.Markdown(f"## {name}: what runs, and what is skipped")
        with gradio.Row():
            with gradio.Column():
                if kind == "image":
                    given: Any = gradio.Image(type="pil", image_mode=None, label="Image", height=240)
                else:
                    given = gradio.Textbox(label="Text", lines=3, placeholder="Type a text")
                slider = gradio.Slider(
                    round(100 * low, 1),
                    round(100 * high, 1),
                    value=round(100 * budget, 1),
                    step=0.1,
                    label="Budget (% of the dense compute, mean over inputs)",
                    elem_id="budget",
                )
                button = gradio.Button("Run", variant="primary", elem_id="run")
                summary = gradio.HTML(elem_id="summary")
            with gradio.Column():
                with gradio.Row():
                    mine = gradio.Label(label="Gated", num_top_classes=TOP)
                    dense = gradio.Label(label="Dense", num_top_classes=TOP)
                sites = gradio.HTML(label="Sites", elem_id="sites")

        def run(value: Any, percent: float) -> tuple[Any, Any, str, str]:
            if value is None or value == "":
                raise gradio.Error("give an image" if kind == "image" else "type a text")
            try:
                found = look(gated, loaded, {kind: value}, percent / 100)
            except SurgeryError as error:
                raise gradio.Error(str(error)) from error
            return found["gated"], found["dense"], summary_html(found), sites_html(found["rates"])

        def moved(value: Any, percent: float) -> tuple[Any, ...]:
            return (gradio.skip(),) * 4 if value is None or value == "" else run(value, percent)

        button.click(run, [given, slider], [mine, dense, summary, sites])
        slider.release(moved, [given, slider], [mine, dense, summary, sites])
    return page


def look(gated: nn.Module, loaded: Loaded, row: Mapping[str, Any], budget: float) -> dict[str, Any]:
    """Run one input gated, at a budget of this call alone, and dense.

    Returns:
        `gated` and `dense`: class -> probability; `rates`: site -> share run; `cost`, and the part of it that `routers`
        are; whether the input was run `again` in full; `milliseconds` and `dense_milliseconds`.
    """
    import torch

    from surgery.calling import as_batch, call, read_output
    from surgery.context import state_of
    from surgery.costs import costs_of, looked_at, place
    from surgery.costs import run as first_run
    from surgery.guarding import running

    state = state_of(gated)
    batch = place(as_batch(loaded.collate([loaded.preprocess(row)], None)), gated)
    with torch.no_grad():
        with running(gated, budget):
            first_run(gated, batch)  # it pays for what later ones do not, and is refused by name
        start = time.perf_counter()
        with running(gated, budget) as events:
            output = read_output(call(gated, batch))
        middle = time.perf_counter()
        with running(gated, 1.0):
            reference = read_output(call(gated, batch))
        end = time.perf_counter()
    rates: dict[str, float] = {}
    routed = {unit for event in events if event.scores is not None for unit in event.by_unit()}
    for event in events:
        rates.update({unit: float(share[0]) for unit, share in event.by_unit().items()})
    return {
        "gated": _classes(output[0], loaded.label_names),
        "dense": _classes(reference[0], loaded.label_names),
        "rates": {name: rates.get(name, 1.0) for name in state.units},
        "cost": float(costs_of(events, state.costs, 1)[0]),
        "routers": sum(state.costs.sites[unit].router for unit in routed) / state.costs.dense,
        "again": bool(looked_at(events, 1)[0]),
        "milliseconds": 1e3 * (middle - start),
        "dense_milliseconds": 1e3 * (end - middle),
    }


def summary_html(found: Mapping[str, Any]) -> str:
    """Cost and latency in one line, and in a second one what the cost is made of."""
    made = f"deciding costs {100 * found['routers']:.1f} %, what ran the rest" if found["routers"] else ""
    if found["again"]:
        made = f"the first pass was not sure, so this input was run again in full; both passes count{made and f', and {made}'}"
    elif found["cost"] > 1:
        made += ": the routers come on top where everything runs"
    return (
        f"<p>cost <b>{100 * found['cost']:.1f} %</b> of dense · "
        f"gated <b>{found['milliseconds']:.1f} ms</b>, dense {found['dense_milliseconds']:.1f} ms</p>"
        f'<p style="font-size:.85rem;opacity:.8">{made}</p>'
    )


def sites_html(rates: Mapping[str, float]) -> str:
    """The network from top to bottom, each site as a bar of what ran; words and hatching beside colour."""
    from html import escape

    start = _shared(list(rates))
    rows = (
        [f'<p style="font-size:.85rem;opacity:.8;margin:.15rem 0">sites of {escape(start[:-1])}</p>'] if start else []
    )
    for name, rate in rates.items():
        said = "ran" if rate >= 1 else "skipped" if rate <= 0 else f"{100 * rate:.0f} % of tokens ran"
        rows.append(
            '<div style="display:grid;grid-template-columns:minmax(0,6fr) minmax(3rem,5fr) minmax(0,8.5rem);'
            'align-items:center;gap:.6rem;margin:.15rem 0">'
            '<span style="font-size:.85rem;overflow-wrap:anywhere" '
            f'title="{escape(name, quote=True)}">{escape(name.removeprefix(start))}</span>'
            '<span style="height:.9rem;border:1px solid #888;border-radius:3px;'
            'background:repeating-linear-gradient(45deg,transparent 0 4px,#8884 4px 6px)">'
            f'<span style="display:block;height:100%;width:{100 * rate:.1f}%;background:#0072B2"></span></span>'
            f'<span style="font-size:.85rem">{said}</span></div>'
        )
    return f"<div>{''.join(rows)}</div>"


def _shared(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot; nothing where there is one name only."""
    start = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(names) < 2 or len(set(parts)) > 1:
            break
        start.append(parts[0])
    return "".join(f"{part}." for part in start)


def _classes(logits: Any, names: Sequence[str]) -> dict[str, float]:
    """The most probable classes."""
    if logits.dim() != 1 or len(logits) < 2:
        raise SurgeryError("the page shows classifiers; this model's output has no classes")
    shares = logits.float().softmax(0)
    values, places = shares.topk(min(TOP, len(shares)))
    return {
        names[place] if place < len(names) else str(place): value
        for place, value in zip(places.tolist(), values.tolist(), strict=True)
    }
