"""Bypass Surgery: turn a pretrained network into one that decides, input by input, what it can skip."""

from __future__ import annotations

from surgery.auditing import Audit, audit
from surgery.calibration import budget_range, calibrate, set_budget
from surgery.checkpoints import load, save
from surgery.context import execution, force, tape
from surgery.conversion import UnmeasuredQuality, convert
from surgery.exporting import Exported, export
from surgery.finding import find_sites
from surgery.fitting import fit_skip_paths
from surgery.guarding import Guard, Health
from surgery.hub import pull, push, push_to_hub
from surgery.logs import Log, read_log
from surgery.look_calibration import calibrate_second_look
from surgery.measurement import measure
from surgery.overview import Status, status
from surgery.pinning import pin
from surgery.recording import Recorder, record
from surgery.regression import regress_routers
from surgery.replaying import Replay, replay
from surgery.reports import Peer, Report
from surgery.rewriting import insert_gates, remove, show
from surgery.sites import Plan, Rejection, Site, SitePlan, Sites
from surgery.training import History, Options, train_routers

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "Exported",
    "Guard",
    "Health",
    "History",
    "Log",
    "Options",
    "Peer",
    "Plan",
    "Recorder",
    "Rejection",
    "Replay",
    "Report",
    "Site",
    "SitePlan",
    "Sites",
    "Status",
    "UnmeasuredQuality",
    "audit",
    "budget_range",
    "calibrate",
    "calibrate_second_look",
    "convert",
    "execution",
    "export",
    "find_sites",
    "fit_skip_paths",
    "force",
    "insert_gates",
    "load",
    "measure",
    "pin",
    "pull",
    "push",
    "push_to_hub",
    "read_log",
    "record",
    "regress_routers",
    "remove",
    "replay",
    "save",
    "set_budget",
    "show",
    "status",
    "tape",
    "train_routers",
]
