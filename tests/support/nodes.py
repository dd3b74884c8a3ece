"""Ranks on nodes of their own: each takes its host's name from its number."""

from __future__ import annotations

import socket


def name_host(rank: int, ranks_per_node: int = 2, cyclic: bool = False) -> None:
    """Give this process the host name of its node; cyclic: neighbours run on different nodes.

    With `cyclic` there are two nodes.
    """
    node = rank % 2 if cyclic else rank // ranks_per_node
    socket.gethostname = lambda: f"node{node}"
