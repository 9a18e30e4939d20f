"""Bypass Surgery: turn a pretrained network into one that decides, input by input, what it can skip."""

from __future__ import annotations

from surgery.context import execution, force
from surgery.finding import find_sites
from surgery.rewriting import insert_gates, remove, show
from surgery.sites import Plan, Rejection, Site, SitePlan, Sites

__version__ = "0.1.0"
