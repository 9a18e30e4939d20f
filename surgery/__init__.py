"""Bypass Surgery: turn a pretrained network into one that decides, input by input, what it can skip.

A name is imported when it is first used, so that `surgery --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.adaptation import heal as heal
    from surgery.auditing import audit as audit
    from surgery.audits import Audit as Audit
    from surgery.budgets import budget_range as budget_range
    from surgery.budgets import set_budget as set_budget
    from surgery.calibration import calibrate as calibrate
    from surgery.checkpoints import load as load
    from surgery.checkpoints import save as save
    from surgery.context import execution as execution
    from surgery.context import force as force
    from surgery.context import prompt_length as prompt_length
    from surgery.context import tape as tape
    from surgery.conversion import UnmeasuredQuality as UnmeasuredQuality
    from surgery.conversion import convert as convert
    from surgery.cutting import cut_order as cut_order
    from surgery.exporting import Exported as Exported
    from surgery.exporting import export as export
    from surgery.finding import find_sites as find_sites
    from surgery.fitting import fit_skip_paths as fit_skip_paths
    from surgery.guarding import Guard as Guard
    from surgery.guarding import Health as Health
    from surgery.healing import unhealed as unhealed
    from surgery.hub import pull as pull
    from surgery.hub import push as push
    from surgery.hub import push_to_hub as push_to_hub
    from surgery.logs import Log as Log
    from surgery.logs import read_log as read_log
    from surgery.look_calibration import calibrate_second_look as calibrate_second_look
    from surgery.measurement import measure as measure
    from surgery.nesting import train_skip_paths as train_skip_paths
    from surgery.options import Options as Options
    from surgery.overview import Status as Status
    from surgery.overview import status as status
    from surgery.pinning import pin as pin
    from surgery.recording import Recorder as Recorder
    from surgery.recording import record as record
    from surgery.regression import regress_routers as regress_routers
    from surgery.replaying import Replay as Replay
    from surgery.replaying import replay as replay
    from surgery.reports import Peer as Peer
    from surgery.reports import Report as Report
    from surgery.rewriting import insert_gates as insert_gates
    from surgery.rewriting import remove as remove
    from surgery.rewriting import show as show
    from surgery.sites import Plan as Plan
    from surgery.sites import Rejection as Rejection
    from surgery.sites import Site as Site
    from surgery.sites import SitePlan as SitePlan
    from surgery.sites import Sites as Sites
    from surgery.training import History as History
    from surgery.training import train_routers as train_routers

__version__ = "0.1.0"

_HOMES = {
    "adaptation": ("heal",),
    "auditing": ("audit",),
    "audits": ("Audit",),
    "budgets": ("budget_range", "set_budget"),
    "calibration": ("calibrate",),
    "checkpoints": ("load", "save"),
    "context": ("execution", "force", "prompt_length", "tape"),
    "conversion": ("UnmeasuredQuality", "convert"),
    "cutting": ("cut_order",),
    "exporting": ("Exported", "export"),
    "finding": ("find_sites",),
    "fitting": ("fit_skip_paths",),
    "guarding": ("Guard", "Health"),
    "healing": ("unhealed",),
    "hub": ("pull", "push", "push_to_hub"),
    "logs": ("Log", "read_log"),
    "look_calibration": ("calibrate_second_look",),
    "measurement": ("measure",),
    "nesting": ("train_skip_paths",),
    "options": ("Options",),
    "overview": ("Status", "status"),
    "pinning": ("pin",),
    "recording": ("Recorder", "record"),
    "regression": ("regress_routers",),
    "replaying": ("Replay", "replay"),
    "reports": ("Peer", "Report"),
    "rewriting": ("insert_gates", "remove", "show"),
    "sites": ("Plan", "Rejection", "Site", "SitePlan", "Sites"),
    "training": ("History", "train_routers"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
