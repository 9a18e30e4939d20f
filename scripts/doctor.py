"""`surgery doctor`: versions, devices, what is installed, and what will not work here."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from surgery.scripts import options
from surgery.scripts.bars import waiting
from surgery.scripts.running import command, show, show_json

REQUIRED = ("torch", "timm", "transformers", "accelerate", "huggingface_hub", "safetensors", "typer", "rich")
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "torchvision": ("data", "images cannot be resized as timm's own preprocessing does"),
    "datasets": ("data", "--data reads digits only"),
    "pillow": ("data", "image files cannot be read"),
    "pyarrow": ("data", "parquet files cannot be read"),
    "scikit-learn": ("data", "`surgery demo` and --data digits will not work"),
    "matplotlib": ("plot", "nothing is drawn: `surgery report`, `audit --picture`, pictures of `demo` and `compare`"),
    "onnx": ("onnx", "`surgery export` writes .pt2 only"),
    "onnxscript": ("onnx", "`surgery export` writes .pt2 only"),
    "onnxruntime": ("onnx", "exported ONNX files cannot be run here"),
    "peft": ("heal", "--heal lora and `surgery heal --kind lora` will not work"),
    "prometheus_client": ("monitor", "`surgery.Guard` has no metrics"),
    "torch-pruning": ("compare", "`surgery compare` has no pruned channels"),
    "jinja2": ("report", "`surgery report` will not work"),
    "gradio": ("app", "`surgery app` will not work"),
}


@dataclass(frozen=True)
class Finding:
    """Something that will not work here, and what to do about it."""

    what: str
    remedy: str


@command
def doctor(
    device: options.Device = "auto",
    threads: options.Threads = None,
    seed: options.Seed = 0,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Say what is installed here, and what will not work."""
    with waiting("looking around"):
        options.set_up(threads, seed)
        versions = {name: installed(name) for name in ("bypass-surgery", *REQUIRED, *OPTIONAL)}
        devices = _devices()
        findings = [*_missing(versions), *_machine(devices), *_self_test(options.choose_device(device))]
    if as_json:
        show_json(
            {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "versions": versions,
                "devices": devices,
                "findings": [asdict(one) for one in findings],
            }
        )
    else:
        show(_page(versions, devices, findings))


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    threads = torch.get_num_threads()
    found = [f"cpu ({threads} {'thread' if threads == 1 else 'threads'} of {os.cpu_count()} cores)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _missing(versions: Mapping[str, str | None]) -> list[Finding]:
    findings = []
    for name in REQUIRED:
        if versions[name] is None:
            findings.append(Finding(f"{name} is missing", "pip install bypass-surgery"))
    for name, (extra, consequence) in OPTIONAL.items():
        if versions[name] is None:
            findings.append(Finding(f"{name} is missing: {consequence}", f'pip install "bypass-surgery[{extra}]"'))
    return findings


def _machine(devices: list[str]) -> list[Finding]:
    findings = []
    if len(devices) == 1:
        findings.append(Finding("no accelerator: everything runs on the CPU", "tune small models, or use --limit"))
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name) in ("1", "true", "ON")
    ]
    if offline:
        findings.append(
            Finding(
                f"{offline[0]} is set: timm: and hf: models load from the cache only", f"unset {offline[0]} to download"
            )
        )
    return findings


def _self_test(device: Any) -> list[Finding]:
    """Convert a network of two blocks: gates open must give its bits, closed its input."""
    import torch

    from surgery import find_sites, force, insert_gates
    from surgery.errors import SurgeryError
    from surgery.scripts.two_blocks import TwoBlocks

    model = TwoBlocks().eval().to(device)
    x = torch.randn(3, 8, device=device)
    remedy = "report this with the output of `surgery doctor --json`"
    try:
        with torch.no_grad():
            gated = insert_gates(model, find_sites(model, x))
            with force(gated, 1.0):
                if not torch.equal(gated(x), model(x)):
                    return [Finding("self-test: open gates do not give the original's output", remedy)]
            with force(gated, 0.0):
                if not torch.allclose(gated(x), x):
                    return [Finding("self-test: closed gates do not give the residual stream", remedy)]
    except (SurgeryError, RuntimeError) as error:
        return [Finding(f"self-test: {type(error).__name__}: {error}", remedy)]
    return []


def _page(versions: Mapping[str, str | None], devices: list[str], findings: list[Finding]) -> RenderableType:
    from surgery.tables import rows_table

    rows = [{"package": "python", "version": platform.python_version(), "needed for": ""}]
    for name, found in versions.items():
        extra = f"extra `{OPTIONAL[name][0]}`" if name in OPTIONAL else ""
        rows.append({"package": name, "version": found or "missing", "needed for": extra})
    parts: list[RenderableType] = [rows_table("Installed", rows), Text("Devices", style="bold")]
    parts += [Text(f" {one}") for one in devices]
    parts += [Text(""), Text("What will not work here", style="bold")]
    parts += [Text(f" {one.what}; {one.remedy}", style="yellow") for one in findings] or [
        Text(" nothing known: everything works", style="green")
    ]
    return Group(*parts)
