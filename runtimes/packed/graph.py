"""A packed file on a card, its decode steps replayed as one CUDA graph."""

from __future__ import annotations

from shortstack.runtimes.pytorch_graph import GraphSession
from shortstack.runtimes.pytorch_packed import Running


class PackedGraphSession(Running, GraphSession):
    """What GraphSession is to a folder, to a packed file."""
