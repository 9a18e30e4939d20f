"""The model card of a converted model, written from what was measured; what was not measured is said to be so."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PLOT = "active_rates.png"
_MOST_ROWS = 40


def card(
    config: Mapping[str, Any],
    repository: str,
    tags: Iterable[str],
    metadata: Mapping[str, Any],
    *,
    plotted: bool = False,
) -> str:
    """The text of a `README.md`.

    Args:
        config: What `surgery_config.json` holds.
        repository: `user/name`.
        tags: For the Hub's search.
        metadata: `license` and `base_model` of the base's repository, where known.
        plotted: Whether `active_rates.png` lies beside it.
    """
    from huggingface_hub import ModelCardData

    base = config["base"]
    library = "transformers" if _native(config) else base.get("library") or "pytorch"
    data = ModelCardData(library_name=library, tags=list(dict.fromkeys(tags)), **metadata)
    name = str(base.get("class", "")).rpartition(".")[2]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        _what(config, name, metadata),
        "## Use",
        _use(config, repository, name),
        "## Budgets",
        _budgets(config),
        "## Measurements",
        _measurements(config.get("report") or {}),
        "## Where it saves",
        (f"![Share of inputs for which each branch ran]({PLOT})\n\n" if plotted else "") + _sites(config),
        "## Limits",
        _limits(config),
        "## Licence and base",
        _licence(config, metadata),
    ]
    return "\n\n".join(parts) + "\n"


def rates_plot(config: Mapping[str, Any]) -> bytes | None:
    """A PNG of each site's active rate at the budget that is set; None where matplotlib is missing or nothing is known."""
    rates = _rates(config)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not rates:
        return None
    figure = Figure(figsize=(7.0, 1.0 + 0.18 * min(len(rates), 200)), layout="constrained")
    axes = figure.add_subplot()
    names = list(rates)[:200]
    axes.barh(range(len(names)), [rates[name] for name in names], color="#0072B2")
    axes.set(
        yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="share of inputs for which the branch ran"
    )
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()  # first executed on top
    out = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _what(config: Mapping[str, Any], name: str, metadata: Mapping[str, Any]) -> str:
    sites = config["plan"]["sites"]
    kinds = [one["site"]["kind"] for one in sites]
    counted = ", ".join(f"{kinds.count(kind)} of kind {kind}" for kind in dict.fromkeys(kinds))
    how = sorted({f"per {one['granularity']}" for one in sites})
    origin = metadata.get("base_model") or config["base"].get("spec") or f"a {name}"
    policy = (
        "A frozen choice of branches runs, the same for every input: no decision per input was closer to the dense model "
        "at this cost in calibration."
        if config.get("policy") == "static"
        else "Small routers decide, input by input, which branches run."
    )
    return (
        f"`{origin}` ({name}), converted with [Bypass Surgery](https://pypi.org/project/bypass-surgery/): "
        f"{len(sites)} residual branches can be skipped ({counted}), decided {' or '.join(how)}. {policy} "
        f"The weights of the base are unchanged; {_fitted(config)} were fitted."
    )


def _fitted(config: Mapping[str, Any]) -> str:
    healing = config.get("healing")
    if not healing:
        return "only routers and what replaces a skipped branch"
    what = "scales and shifts of its norms" if healing["kind"] == "norms" else "low-rank changes of its linear maps"
    return (
        "routers, what replaces a skipped branch and, beside the base's parameters and in force only where branches may be "
        f"skipped, {what} (healing)"
    )


def _use(config: Mapping[str, Any], repository: str, name: str) -> str:
    known = config["base"].get("spec") or config["base"].get("included")
    if _native(config):
        imports = "import surgery.adapters.huggingface, transformers"
        made = f'transformers.{name}.from_pretrained("{repository}")'
        after = "Without the first import the gates are ignored, and transformers says so."
    elif known:
        imports, made = "import surgery", f'surgery.load("{repository}")'
        after = "The base is downloaded where it is not in the cache, and compared with the hash that was recorded."
    else:
        imports, made = "import surgery", f'surgery.load("{repository}", model=dense)'
        after = f"`dense` is the {name} that was converted; its weights are compared with the hash that was recorded."
    lines = [imports, f"model = {made}"]
    attainable = [point["cost"] for point in config["table"] if point["cost"] <= 1]
    if attainable:
        other = math.ceil(100 * min(attainable)) / 100
        lines.append(f"surgery.set_budget(model, {other:.2f})  # another budget, the same checkpoint")
    return "```python\n" + "\n".join(lines) + "\n```\n\n" + after


def _budgets(config: Mapping[str, Any]) -> str:
    unit = "time on the machine of its conversion" if config["costs"]["unit"] == "seconds" else "FLOPs"
    costs = sorted(point["cost"] for point in config["table"])
    if not costs:
        return "It was not calibrated, so it runs dense."
    budget = config.get("budget")
    asked = "without a budget and runs dense" if budget is None else f"at a budget of {budget:g}"
    reach = f"from {costs[0]:.3f} to {min(costs[-1], 1.0):.3f} of the dense model's {unit}"
    return f"It was saved {asked}. Calibrated mean costs reach {reach}."


def _measurements(report: Mapping[str, Any]) -> str:
    rows = [one for one in report.values() if isinstance(one, Mapping) and "cost" in one and "samples" in one]
    if not rows:
        return "None are stored with this checkpoint: its quality is unknown. `surgery score DIR --data … --keep` measures it."
    name = next(iter(rows[0].get("metric") or {}), None)
    head = [
        "budget",
        "cost",
        name or "agreement with dense",
        "dense",
        "static cut of the same cost",
        "difference (95 %)",
    ]
    head.append("time by dense")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in sorted(rows, key=lambda row: -row["cost"]):
        mine = (one.get("metric") or {}).get(name, one.get("agreement"))
        dense = (one.get("dense_metric") or {}).get(name)
        static = next((peer for peer in one.get("peers", ()) if peer["name"] == "static"), None)
        speed = ", ".join(f"N={size}: {ratio['median']:.2f}x" for size, ratio in (one.get("speed") or {}).items())
        unhealed = next((peer for peer in one.get("peers", ()) if peer["name"] == "unhealed"), None)
        beside = f" ({_text(unhealed['metric'])} unhealed)" if unhealed else " (healed)" if one.get("healed") else ""
        cells = [_text(one.get("budget")), _text(one["cost"]), _text(mine) + beside, _text(dense)]
        if static is None:
            cells += ["not measured", ""]
        else:
            cells += [
                _text(static["metric"]),
                f"{static['difference']:+.4f} [{static['low']:+.4f}, {static['high']:+.4f}]",
            ]
        lines.append("| " + " | ".join([*cells, speed or "not measured"]) + " |")
    data = sorted({str(one.get("data", "")) for one in rows})
    where = rows[0].get("conditions") or {}
    machine = ", ".join(f"{key} {value}" for key, value in where.items() if value not in (None, ""))
    about = f"On {'; '.join(data)}. Intervals are paired bootstraps over inputs. {machine}"
    return "\n\n".join(part for part in ("\n".join(lines), about, _phases(rows)) if part)


def _phases(rows: Sequence[Mapping[str, Any]]) -> str:
    """What reading and writing cost a causal language model, apart."""
    found = [(one, phase) for one in sorted(rows, key=lambda row: -row["cost"]) for phase in one.get("phases") or ()]
    if not found:
        return ""
    lines = ["| budget | phase | mean context | FLOPs per token, share of dense |", "|---|---|---|---|"]
    lines += [
        f"| {_text(one.get('budget'))} | {phase['name']} | {phase['context']:.0f} | {_text(phase['cost'])} |"
        for one, phase in found
    ]
    return (
        "\n".join(lines)
        + "\n\nCounted one text at a time with a key/value cache, keys and values of skipped tokens included."
    )


def _sites(config: Mapping[str, Any]) -> str:
    rates = _rates(config)
    if not rates:
        return "Active rates are not known, since it was not calibrated."
    plans = {one["site"]["name"]: one for one in config["plan"]["sites"]}
    lines = ["| site | kind | instead of the branch | active rate |", "|---|---|---|---|"]
    for name, rate in list(rates.items())[:_MOST_ROWS]:
        lines.append(f"| `{name}` | {plans[name]['site']['kind']} | {plans[name]['skip']} | {rate:.2f} |")
    more = len(rates) - _MOST_ROWS
    return "\n".join(lines) + (f"\n\n… and {more} more." if more > 0 else "")


def _limits(config: Mapping[str, Any]) -> str:
    notes = list(config.get("notes") or ())
    for one in (config.get("report") or {}).values():
        notes += one.get("notes", ()) if isinstance(one, Mapping) else ()
    lines = [
        "- Budgets hold on average over inputs like those of the calibration; single inputs cost more or less.",
        "- FLOPs saved are not time saved on every machine: `surgery benchmark` measures yours.",
        "- What the base cannot do or does wrongly, this model does not do better.",
    ]
    return "\n".join([*lines, *(f"- {note}" for note in dict.fromkeys(map(str, notes)))])


def _licence(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> str:
    base = config["base"]
    licence = metadata.get("license")
    said = "The base's licence is not recorded; ask its authors."
    if licence:
        said = f"The base's licence is `{licence}`, which applies to this model too."
    origin = metadata.get("base_model") or base.get("spec") or base.get("class")
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    return f"Base: `{origin}`{revision}, weights with SHA-256 `{base.get('sha256')}`. {said}"


def _rates(config: Mapping[str, Any]) -> dict[str, float]:
    """Active rates of the table's row whose threshold is set, in order of execution."""
    row = next((point for point in config["table"] if point["threshold"] == config["threshold"]), None)
    if row is None:
        return {}
    order = [one["site"]["name"] for one in config["plan"]["sites"]]
    static = config.get("static") or {}
    fixed = {unit: float(kept) for unit, kept in static.items()} if config.get("policy") == "static" else None
    rates = row["active_rate"] if not fixed else {unit: fixed.get(unit, 1.0) for unit in row["active_rate"]}
    found = {}
    for name in order:
        heads = re.compile(rf"{re.escape(name)}(\.\d+)?")  # heads are counted one by one
        own = [rate for unit, rate in rates.items() if heads.fullmatch(unit)]
        found[name] = sum(own) / len(own)
    return found


def _native(config: Mapping[str, Any]) -> bool:
    return bool(config["base"].get("included")) and "tensors_sha256" not in config


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
