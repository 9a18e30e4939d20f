"""Tables of the real runs (`surgery.scripts.real_runs`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from surgery.scripts.seeds import gap_text, range_text

COLUMNS = {"trained": "routers and skip paths", "routers": "routers alone", "healed": "healed"}


def markdown(result: Mapping[str, Any]) -> str:
    """One network's tables."""
    if "trained" not in result:
        return f"{result['title']}: not scored yet\n"
    dense, trained = result["dense"], result["trained"]
    seeds = len(trained[0]["scores"])
    runs = "static" if result["policy"][0] == "static" else "routed"
    looked = ", with a second look" if any(result["looks"]) else ""
    lines = [
        f"### {result['title']}",
        "",
        f"Dense: {result['metric']} {dense:.4f} on {result['inputs']:,} test inputs. {seeds} conversion{'s' * (seeds > 1)}, "
        f"means with smallest and largest; {runs}{looked}. Differences in points, with paired 95 % intervals.",
        "",
    ]
    peers = [name for name in ("static", "shuffled") if name in trained[0]["ahead"]]
    head = ["budget", "cost", "submodules", "gated", "share of dense", "target", "minus dense"]
    head += [f"minus {name}" for name in peers]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for point in trained:
        cells = [
            f"{point['budget']:.2f}",
            range_text(point["costs"], 3),
            range_text(point["submodules"], 3),
            range_text(point["scores"], 4),
            _share(_mean(point["scores"]), dense),
            result["targets"].get(str(point["budget"]), ""),
            gap_text(point["gap"]),
            *(gap_text(point["ahead"][name]) for name in peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for table in (_columns(result), _peers(result), _times(result)):
        lines += ["", *table] if table else []
    return "\n".join([*lines, ""])


def _columns(result: Mapping[str, Any]) -> list[str]:
    """Three columns, never mixed."""
    known = [column for column in COLUMNS if result.get(column)]
    undone = "healed" in result and result["healed"] is None
    if len(known) == 1:
        return ["Healing left held-out outputs no nearer to dense and was undone."] if undone else []
    head = ["budget", *(f"{COLUMNS[column]}: cost, {result['metric']}, share" for column in known)]
    lines = ["Three columns; routers alone and healed are of the first seed, the other one is the mean from above:", ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for index, point in enumerate(result["trained"]):
        cells = [f"{point['budget']:.2f}"]
        for column in known:
            one = result[column][index]
            score = _mean(one["scores"])
            cells.append(f"{_mean(one['costs']):.3f}, {score:.4f}, {_share(score, result['dense'])}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *(["", "Healing left held-out outputs no nearer to dense and was undone."] if undone else [])]


def _peers(result: Mapping[str, Any]) -> list[str]:
    """Policies that ignore the input, beside the first seed."""
    if "peers" not in result:
        return []
    names = list(dict.fromkeys(peer["name"] for peers in result["peers"].values() for peer in peers))
    lines = [
        f"The first seed minus policies that ignore the input, at its cost, on {result['peer_inputs']:,} test inputs, in points:",
        "",
        f"| budget | {' | '.join(names)} |",
        f"|{'---|' * (1 + len(names))}",
    ]
    for budget, peers in result["peers"].items():
        found = {peer["name"]: peer for peer in peers}
        cells = [_ahead(found[name]) if name in found else "" for name in names]
        lines.append(f"| {float(budget):.2f} | {' | '.join(cells)} |")
    return lines


def _ahead(peer: Mapping[str, Any]) -> str:
    return gap_text((peer["difference"], peer["low"], peer["high"]))


def _times(result: Mapping[str, Any]) -> list[str]:
    if "times" not in result:
        return []
    sizes, looks = list(next(iter(result["times"].values()))), any(result["looks"])
    where = ", ".join(f"{name} {value}" for name, value in result["conditions"].items())
    where += "; one where the column says so" * any("one thread" in size for size in sizes)
    lines = [
        f"Time of the first seed by that of the dense network, medians and middle halves of at least 30 pairs ({where})"
        f"{'; in brackets also the sum of all calls, since second looks are few and long' * looks}:",
        "",
        f"| budget | {' | '.join(f'N = {size}' for size in sizes)} |",
        f"|{'---|' * (1 + len(sizes))}",
    ]
    for budget, ratios in result["times"].items():
        cells = [
            f"{r['median']:.2f}x ({r['q1']:.2f} to {r['q3']:.2f}{'; all ' + format(r['total'], '.2f') if looks else ''})"
            for r in (ratios[size] for size in sizes)
        ]
        lines.append(f"| {float(budget):.2f} | {' | '.join(cells)} |")
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(value: float, dense: float) -> str:
    return f"{100 * value / dense:.1f} %"
