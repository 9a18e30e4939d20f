"""Under autocast, dtypes are decided per call: generated code that was made for others steps aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import decoder
from torch import Tensor, nn

import surgery
from surgery.key_values import KeyWriter
from surgery.tracing import is_autocast


class Cautious(nn.Module):
    """It asks for the dtype, which its program holds fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.down(self.up(x).relu())
        if branch.dtype == torch.bfloat16:
            branch = branch.clamp(-0.1, 0.1)
        return x + branch


def test_it_is_seen_where_the_parameters_are() -> None:
    module, moved = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    assert not is_autocast(module) and not is_autocast(moved)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_autocast(module)
        assert is_autocast(moved)  # offloaded: where it will run is not known
        assert is_autocast(nn.ReLU())
    with torch.autocast("cuda", torch.bfloat16, enabled=False):
        assert not is_autocast(module)


def test_a_host_that_asks_for_dtypes_runs_dense(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Cautious() for _ in range(3))).eval(), torch.randn(4, 16)
    gated = surgery.insert_gates(model, surgery.find_sites(model, x))
    with torch.no_grad(), surgery.force(gated, 0.0):
        assert torch.equal(gated(x), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gated(x), model(x))
    assert "runs dense" in caplog.text


def test_some_queries_of_torchs_own_attention() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval()
    x = torch.randn(3, 5, 16)
    gated = surgery.insert_gates(model, surgery.find_sites(model, x))
    found = []
    for mode in ("skip", "mask"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), surgery.execution(gated, mode):  # type: ignore[arg-type]
            with surgery.force(gated, 0.5, 1):
                found.append(gated(x))
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(*found, rtol=0, atol=0.05)


def test_keys_and_values_are_left_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    model: Any = decoder("llama", layers=2).float()
    ids = torch.randint(5, 30, (2, 6))
    gated = surgery.insert_gates(model, surgery.find_sites(model, {"input_ids": ids}))
    written: list[bool] = []
    write = KeyWriter.write

    def noted(self: KeyWriter, host: nn.Module, inputs: Any) -> bool:
        written.append(write(self, host, inputs))
        return written[-1]

    monkeypatch.setattr(KeyWriter, "write", noted)

    def fill() -> None:
        cache = transformers.DynamicCache(config=gated.config)
        with torch.no_grad(), surgery.force(gated, 0.0):
            gated(input_ids=ids, past_key_values=cache, use_cache=True)

    with torch.autocast("cpu", torch.bfloat16):
        fill()
    assert written and not any(written)
    written.clear()
    fill()
    assert written and all(written)
