"""The report: `ReportData` in; report.html, report.md and report.json out."""

from shortstack.devices.report.compare import Comparison, speedups
from shortstack.devices.report.data import Entry, ModelFacts, Quality, ReportData
from shortstack.devices.report.render import to_html, to_json, to_markdown, write_report

__all__ = [
    "Comparison",
    "Entry",
    "ModelFacts",
    "Quality",
    "ReportData",
    "speedups",
    "to_html",
    "to_json",
    "to_markdown",
    "write_report",
]
