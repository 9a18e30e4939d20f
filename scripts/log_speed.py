"""What recording costs: `python -m surgery.scripts.log_speed`, deit_small at batch 1, recorded against not recorded."""

from __future__ import annotations

import tempfile

import timm
import torch

import surgery
from surgery.gates import iter_gates
from surgery.timing import compare, conditions

REPEATS = 60


def main() -> None:
    """Print the median ratio over pairs of calls on the same inputs."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    gated = surgery.insert_gates(model, surgery.find_sites(model, torch.randn(2, 3, 224, 224)))
    for _, gate in iter_gates(gated):  # decisions that vary cost more to write than the untrained routers' would
        for parameter in gate.router.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = [torch.randn(1, 3, 224, 224) for _ in range(8)]
    turns = {"recorded": 0, "plain": 0}

    def step(name: str) -> torch.Tensor:
        turns[name] += 1
        return inputs[turns[name] % len(inputs)]

    with (
        tempfile.TemporaryDirectory() as folder,
        surgery.execution(gated, "skip"),
        surgery.record(gated, folder) as log,
    ):

        def plain() -> None:
            with surgery.context.override(surgery.context.state_of(gated), recorder=None):
                gated(step("plain"))

        found = compare(lambda: gated(step("recorded")), plain, repeats=REPEATS)
        log.flush()
        size = sum(file.stat().st_size for file in surgery.read_log(folder).parts())
    print(f"recorded / plain: median {found.median:.4f}, middle half {found.q1:.4f} to {found.q3:.4f}")  # noqa: T201
    print(f"{found.a_ms:.1f} ms against {found.b_ms:.1f} ms; {size / log.calls / 1e3:.1f} kB a row")  # noqa: T201
    print(conditions())  # noqa: T201


if __name__ == "__main__":
    main()
