"""The scenario report: one HTML page that needs no network, and a CSV, from cells. It runs nothing, opens no file."""

from __future__ import annotations

from splitwise_llm.page.csv import to_csv
from splitwise_llm.page.html import to_html
from splitwise_llm.page.inputs import Ablation, Claim, Contents, MemoryRow, Provenance, Scaling, Setting

__all__ = [
    "Ablation",
    "Claim",
    "Contents",
    "MemoryRow",
    "Provenance",
    "Scaling",
    "Setting",
    "to_csv",
    "to_html",
]
