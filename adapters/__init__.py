"""What each ecosystem needs to be loaded, called and fed: one adapter per ecosystem, looked up by name, lazily.

    loaded = load_model("timm:resnet50")                    # a model, and how a dataset's rows become its inputs
    loader = load_data("images/", loaded, split="train")
    example = adapter_for(loaded.model).example(loaded.model)

A package of someone else's adds an adapter through the entry point group `surgery.adapters`. The entry point's name is
the adapter's name, the prefix of its `MODEL` strings, and the package whose classes it handles:

    [project.entry-points."surgery.adapters"]
    open_clip = "their_package.surgery:ADAPTER"
"""

from surgery.adapters.base import Adapter, Loaded, Preprocess
from surgery.adapters.data import Loader, load_data
from surgery.adapters.digits import digits
from surgery.adapters.models import load_model
from surgery.adapters.registry import adapter_for, adapter_names, get_adapter
from surgery.adapters.specs import Spec, parse_spec

__all__ = [
    "Adapter",
    "Loaded",
    "Loader",
    "Preprocess",
    "Spec",
    "adapter_for",
    "adapter_names",
    "digits",
    "get_adapter",
    "load_data",
    "load_model",
    "parse_spec",
]
