"""Exits of one frozen model (Balcony, arXiv:2503.05005): the files and the model that runs at them.

`folder` reads and writes the two files of a set of exits and needs no torch; `named` reads names
such as `EXITS@15`; `model` runs them.
"""

from shortstack.exits.folder import ExitFolder, is_exits, parse_exits, read_exits
from shortstack.exits.named import config_at, split_depth

__all__ = ["ExitFolder", "config_at", "is_exits", "parse_exits", "read_exits", "split_depth"]
