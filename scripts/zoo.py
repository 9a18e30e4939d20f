"""The zoo: tiny random networks of many architectures, offline, each with the number of branches it ought to have.

`LAWS` is a short list that the law tests run in full; `COVERAGE` is the long list behind `surgery coverage`. The
expected number of sites is counted from the classes of the model's own modules (`two adds per BertLayer`), never by
the finder that is being checked.

Axis letters: `N` samples, `T` tokens, `C` channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Example = Tensor | tuple[Any, ...] | dict[str, Any]
"""What a model is called with: a tensor, positional arguments, or keyword arguments."""


Adds = int | str | tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One network of the zoo.

    Args:
        name: `<family>/<architecture>`.
        make: Builds the network, tiny and with random weights.
        inputs: Builds random inputs for `N` samples from the global random state.
        adds: Residual branches per module of a class: a number, the name of an attribute without which (None or False)
            the module has no such add, or several of these. Empty where there is no residual add.
        note: Whatever the count does not say by itself.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Example]
    adds: tuple[tuple[str, Adds], ...] = ()
    note: str = ""

    @property
    def family(self) -> str:
        """timm, transformers, torchvision or plain."""
        return self.name.split("/")[0]

    def build(self, samples: int = 2, seed: int = 0) -> tuple[nn.Module, Example]:
        """The network in eval mode, moved away from its initialisation, and an example of `samples` samples.

        Its parameters are frozen, as those of a gated copy are: torch folds the axes of a matrix product in another way
        where a weight requires gradients, which changes the last bit.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make().eval().requires_grad_(False)
            shake(model, self.inputs(4))
        return model, self.example(samples, seed)

    def example(self, samples: int, seed: int = 0) -> Example:
        """Inputs for `samples` samples, the same ones for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs(samples)

    def expected(self, model: nn.Module) -> int:
        """How many residual branches `model` has, by the classes of its modules."""
        per_class = dict(self.adds)
        unseen = set(per_class)
        total = 0
        for module in model.modules():
            name = type(module).__name__
            if name in per_class:
                unseen.discard(name)
                total += sum(_present(module, count) for count in _each(per_class[name]))
        if unseen:
            raise AssertionError(f"{self.name} has no module of class {', '.join(sorted(unseen))}")
        return total

    def counted(self) -> str:
        """The count in words: `2 per BertLayer`."""
        words = (
            f"{count} per {name}" if isinstance(count, int) else f"1 per {name} with {count}"
            for name, counts in self.adds
            for count in _each(counts)
        )
        return ", ".join(words) or "no residual add"


def _each(adds: Adds) -> tuple[int | str, ...]:
    return adds if isinstance(adds, tuple) else (adds,)


def _present(module: nn.Module, count: int | str) -> int:
    if isinstance(count, int):
        return count
    value = getattr(module, count)
    return int(value is not None and value is not False)


def shake(model: nn.Module, example: Example) -> None:
    """Move a fresh network away from its initialisation, in place.

    Zero-initialised gains, layer scales of 1e-6 and tiny weights would make a skipped branch invisible. Matrices are
    scaled up to a standard deviation of at least 0.8 / sqrt(fan-in), constant parameters become random, and running
    statistics become those of `example`, disturbed.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() < 2:
                continue
            noise = torch.randn_like(parameter)
            spread, size = parameter.std(), parameter.abs().mean()
            if spread > 1e-4 and parameter.dim() >= 2:
                floor = 0.8 / (parameter[0].numel() ** 0.5)
                parameter.mul_(max(1.0, float(floor / spread)))
            elif spread > 1e-4:
                parameter.add_(0.1 * spread * noise)
            elif size < 1e-2 and parameter.dim() == 1 and not name.endswith("bias"):
                parameter.copy_(0.5 + 0.1 * noise)  # zero-initialised gains, layer scales, norms that add one
            else:  # gains of one, biases, tables of positions, zero-initialised weights
                parameter.add_(0.1 * noise)
        _settle_statistics(model, example)


def _settle_statistics(model: nn.Module, example: Example) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become those of this one batch
        norm.train()
    call(model, example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None and var is not None
        var.clamp_(min=0.05).mul_(torch.exp(0.2 * torch.randn_like(var)))
        mean.add_(0.2 * var.sqrt() * torch.randn_like(mean))


def call(model: nn.Module, example: Example) -> Any:
    """Call `model` with a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def images(size: int) -> Callable[[int], Tensor]:
    """Inputs `(N, 3, size, size)`."""
    return lambda samples: torch.randn(samples, 3, size, size)


def pixel_values(size: int) -> Callable[[int], dict[str, Any]]:
    """The same as the keyword argument of transformers."""
    return lambda samples: {"pixel_values": torch.randn(samples, 3, size, size)}


def texts(length: int = 10, **more: int) -> Callable[[int], dict[str, Any]]:
    """Padded texts of different lengths: token ids 5 to 89, pad id 0 on the right, and their mask.

    Args:
        length: Tokens `T` of the longest.
        more: Further inputs of random ids and their length (`decoder_input_ids=6`).
    """

    def inputs(samples: int) -> dict[str, Any]:
        ids = torch.randint(5, 90, (samples, length))
        mask = torch.ones_like(ids)
        for row in range(samples):
            mask[row, length - (3 * row) % (length // 2) :] = 0
        mask[0] = 1
        return {
            "input_ids": ids * mask,
            "attention_mask": mask,
            **{name: torch.randint(5, 90, (samples, size)) for name, size in more.items()},
        }

    return inputs


def _collect() -> tuple[Entry, ...]:
    from surgery.scripts import zoo_plain, zoo_timm, zoo_transformers

    return (*zoo_timm.ENTRIES, *zoo_transformers.ENTRIES, *zoo_plain.ENTRIES)


_LAWS = (
    "timm/test_resnet",
    "timm/vit_pico",
    "timm/convnext_pico",
    "timm/mobilenetv3_small_050",
    "timm/swin_pico",
    "timm/mixer",
    "timm/test_nfnet",
    "transformers/bert",
    "transformers/roberta",
    "transformers/distilbert",
    "transformers/vit",
    "transformers/llama",
    "transformers/qwen3",
    "transformers/gemma2",
    "transformers/phi",
    "transformers/gpt_neox",
    "transformers/t5",
    "plain/own_vit",
    "plain/translator",
    "plain/waves",
    "plain/odd",
)


def find(name: str) -> Entry:
    """The entry called `name`."""
    for entry in COVERAGE:
        if entry.name == name:
            return entry
    raise KeyError(f"no entry named {name!r}; there are: {', '.join(entry.name for entry in COVERAGE)}")


COVERAGE: tuple[Entry, ...] = _collect()
LAWS: tuple[Entry, ...] = tuple(find(name) for name in _LAWS)
