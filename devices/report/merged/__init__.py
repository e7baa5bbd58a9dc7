"""Records of many machines in; one report.html, report.md, report.csv and llama-bench.json out."""

from shortstack.devices.report.merged.merge import Merged, Projected, merge
from shortstack.devices.report.merged.write import write_merged

__all__ = ["Merged", "Projected", "merge", "write_merged"]
