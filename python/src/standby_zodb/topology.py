"""What a node of Standby says of its cluster, and which addresses follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Address = tuple[str, int] | str
"""A host and a port, or the path of a Unix socket."""

VERSION = 1
"""The version of what a server tells that this package understands."""

KEY = "standby"
"""Where it stands within ZEO's ``info``."""


@dataclass(frozen=True)
class Node:
    """A node that holds data."""

    name: str
    group: str
    role: str
    state: str
    address: Address | None
    read_only_address: Address | None


@dataclass(frozen=True)
class Topology:
    """A cluster at a moment, as the node sees it that the client is connected to."""

    cluster: str
    cluster_id: str
    timeline: int
    term: int
    primary: str | None
    nodes: tuple[Node, ...]
    tokens: bool = False
    """Transactions may have tokens, and a node can be asked for their outcome."""

    @classmethod
    def read(cls, told: object) -> Topology:
        """Reads what a server tells; ValueError if it cannot be understood."""
        match told:
            case {"version": int(version)} if version > VERSION:
                raise ValueError(
                    f"it is of version {version}; this release of standby-zodb knows {VERSION}"
                )
            case {
                "version": int(),
                "cluster": str(cluster),
                "cluster_id": str(cluster_id),
                "timeline": int(timeline),
                "term": int(term),
                "primary": str() | None as primary,
                "nodes": [*nodes],
                **more,
            }:
                nodes_read = tuple(map(_node, nodes))
                tokens = more.get("tokens") is True
                return cls(cluster, cluster_id, timeline, term, primary, nodes_read, tokens)
        raise ValueError("it has not the form that is expected")

    def completed_by(self, former: Topology | None) -> Topology:
        """The same, with addresses that only a former one has.

        A node that has just started knows the members, and has not heard yet where clients reach
        them.
        """
        known = {node.name: node for node in former.nodes} if former else {}

        def complete(node: Node) -> Node:
            before = known.get(node.name, node)
            return replace(
                node,
                address=node.address or before.address,
                read_only_address=node.read_only_address or before.read_only_address,
            )

        return replace(self, nodes=tuple(map(complete, self.nodes)))


@dataclass(frozen=True)
class Preference:
    """Which nodes a client wants: ``primary``, ``replica``, ``nearest`` or ``group:NAME``."""

    kind: str
    group: str = ""

    @classmethod
    def parse(cls, text: str) -> Preference:
        """Reads what a configuration says; ValueError if it is none of them."""
        kind, _, group = text.partition(":")
        if (kind in ("primary", "replica", "nearest") and not group and ":" not in text) or (
            kind == "group" and group
        ):
            return cls(kind, group)
        raise ValueError(f"prefer is {text!r}; it may be primary, replica, nearest or group:NAME")

    @property
    def reads_only(self) -> bool:
        """True if replicas will do, which take no writes."""
        return self.kind != "primary"

    def addresses(self, topology: Topology) -> list[Address]:
        """Where a client with this preference connects, best first; empty if nowhere."""
        if not self.reads_only:
            # All of them: whichever becomes primary answers.
            nodes = sorted(topology.nodes, key=lambda node: node.name != topology.primary)
            return [node.address for node in nodes if node.address is not None]
        readable = [node for node in topology.nodes if node.read_only_address is not None]
        up = [node for node in readable if node.state == "up"] or readable
        wanted = [node for node in up if self._wants(node)]
        # A node that is not preferred is better than none.
        return [node.read_only_address for node in wanted or up if node.read_only_address]

    def _wants(self, node: Node) -> bool:
        match self.kind:
            case "replica":
                return node.role != "primary"
            case "group":
                return node.group == self.group
        # The client connects to all at the same time: the nearest is the first to answer.
        return True


def address(text: str, default_port: int | None = None) -> Address:
    """Reads ``HOST:PORT``, ``[HOST]:PORT`` or a path; ValueError if it is none of them."""
    if "/" in text:
        return text
    host, colon, port = text.rpartition(":")
    if (not colon or text.endswith("]")) and default_port is not None:
        return text.strip("[]"), default_port
    if not host or not port.isdigit():
        raise ValueError(f"{text!r} is not an address: HOST:PORT")
    return host.strip("[]"), int(port)


def _node(told: Mapping[str, Any]) -> Node:
    match told:
        case {
            "node": str(name),
            "group": str(group),
            "role": str(role),
            "state": str(state),
            "address": str(writes),
            "read_only_address": str(reads),
        }:
            return Node(name, group, role, state, _optional(writes), _optional(reads))
    raise ValueError("a node in it has not the form that is expected")


def _optional(text: str) -> Address | None:
    return address(text) if text else None
