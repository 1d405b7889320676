"""The client storage."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ZEO.ClientStorage
from ZEO.Exceptions import ClientDisconnected
from ZODB.POSException import ReadOnlyError
from ZODB.utils import z64

from standby_zodb.outcome import ASK_FOR, PAUSE, Naming, NotCommittedError, OutcomeUnknownError
from standby_zodb.topology import KEY, Address, Preference, Topology

logger = logging.getLogger(__name__)

IDLE = 1
"""Seconds of silence after which the system asks whether the other side's machine is there."""
UNANSWERED = 2
"""After so many questions without an answer, a second apart, it counts as gone."""
PATIENCE = 3000
"""Milliseconds after which what was sent and not acknowledged means the same."""
WIDEN = 2.0
"""Seconds without a connection after which a reader goes to any node that it knows."""
MOVE = 10.0
"""Seconds within which a reader is connected to a node that it prefers, if there is one."""
LOOK = 3.0
"""Seconds between two looks of a reader for a node that it prefers to the one that it uses."""
RARELY = 60.0
"""The same for one that went to such a node again and again, and could not use it."""
REACH = 1.0
"""Seconds within which such a node must accept a connection, and greet."""
QUIET = 0.02
"""Seconds between two looks for a moment in which no call of a reader waits for its answer."""


class ClientStorage(ZEO.ClientStorage.ClientStorage):  # type: ignore[misc]
    """ZEO's client storage, which follows a cluster of Standby.

    ``prefer`` says which nodes are used: ``primary`` (the default), or, for a storage that is
    opened with ``read_only``, ``replica``, ``nearest`` or ``group:NAME``. If there is none of
    these, any other node will do.
    """

    def __init__(
        self,
        addr: int | Address | Sequence[Address],
        *args: Any,
        prefer: str = "primary",
        **kwargs: Any,
    ) -> None:
        self._preference = Preference.parse(prefer)
        if self._preference.reads_only and not kwargs.get("read_only"):
            raise ValueError(
                f"prefer is {prefer!r}, which needs read_only: replicas take no writes"
            )
        self._topology: Topology | None = None
        self._not_understood: str | None = None
        self._transport: asyncio.Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking = False
        self._look_after = LOOK
        self._encrypted = kwargs.get("ssl") is not None
        self._known = self._seeds = self._listed(addr)
        self._conn: Any = None
        self._naming = Naming()
        self._token: bytes | None = None
        super().__init__(addr, *args, **kwargs)
        if self._preference.reads_only and kwargs.get("wait", True):
            self._move()

    @property
    def topology(self) -> Topology | None:
        """The cluster as the connected node sees it; None if the server is no Standby."""
        return self._topology

    # Called by whoever commits. From `tpc_begin` to `tpc_end` ZEO holds its commit lock.

    def tpc_begin(self, txn: Any, tid: bytes | None = None, status: str = " ") -> None:
        """Begins a transaction, and gives it a token if the cluster takes tokens."""
        super().tpc_begin(txn, tid, status)
        self._token = None
        if self._topology is None or not self._topology.tokens:
            return
        token = self._naming.next()
        try:
            self._async("transaction_token", id(txn), token)
        except ClientDisconnected:
            self.tpc_end(txn)
            raise
        self._token = token

    def tpc_finish(self, txn: Any, f: Callable[[bytes], Any] = lambda tid: None) -> bytes:
        """Commits; if the connection breaks meanwhile, asks the cluster what became of it."""
        buffer = self._check_trans(txn, "tpc_finish")
        token, since = self._token, self.lastTransaction() or z64

        def told(tid: bytes) -> None:
            self._naming.finished()
            f(tid)

        self._naming.finishing()
        try:
            return super().tpc_finish(txn, told)  # type: ignore[no-any-return]
        except ClientDisconnected as error:
            if token is None:
                raise
            tid = self._outcome(token, since, error)
        f(tid)
        self._update_blob_cache(buffer, tid)
        return tid

    def _outcome(self, token: bytes, since: bytes, cause: ClientDisconnected) -> bytes:
        """The tid of a transaction that was committed; an error if it was not, or nobody knows."""
        deadline = time.monotonic() + ASK_FOR
        while True:
            try:
                answer = self._call("transaction_outcome", token, since)
                break
            except (ClientDisconnected, ReadOnlyError) as error:
                # There is no primary yet, or it has changed again.
                if self._conn.closed or time.monotonic() > deadline:
                    raise OutcomeUnknownError(
                        "the connection broke during the commit, and no primary could be asked "
                        f"within {ASK_FOR:.0f} s whether the transaction is committed"
                    ) from error
                time.sleep(PAUSE)
            except Exception as error:
                raise OutcomeUnknownError(
                    "the connection broke during the commit, and the server cannot say whether the "
                    f"transaction is committed: {error}"
                ) from error
        if isinstance(answer, bytes):
            logger.info(
                "%s: a commit was under way, and succeeded: %s", self.__name__, answer.hex()
            )
            return answer
        if answer is None:
            logger.info("%s: a commit was under way, and is not there", self.__name__)
            raise NotCommittedError(
                "the connection broke during the commit: the transaction is not committed"
            ) from cause
        raise OutcomeUnknownError(
            f"the connection broke during the commit, and nobody knows whether the transaction is "
            f"committed: {answer}"
        ) from cause

    # Called by ZEO's own thread.

    def info(self, told: dict[str, Any]) -> None:
        """Takes what the server says of itself while the client is connected."""
        super().info(told)
        if self._transport is not None:
            self._note(told)

    def notify_connected(self, conn: Any, info: dict[str, Any]) -> None:
        """Begins to use a connection."""
        super().notify_connected(conn, info)
        self._conn, self._transport = conn, _transport(conn)
        self._loop = asyncio.get_running_loop()
        if self._transport is not None:
            _keep_alive(self._transport)
        if KEY not in info:
            # Not even what another server has said counts.
            self._topology = None
            if self._not_understood is None:
                self._not_understood = "no Standby"
                logger.info(
                    "%s: the server is no node of a Standby cluster; it is used as any ZEO server",
                    self.__name__,
                )
        self._note(info)

    def notify_disconnected(self) -> None:
        """Loses a connection."""
        self._transport = None
        super().notify_disconnected()
        if self._preference.reads_only and self._loop is not None:
            self._loop.call_later(WIDEN, self._widen)

    def _note(self, info: dict[str, Any]) -> None:
        told = info.get(KEY)
        if told is None:
            return
        try:
            topology = Topology.read(told)
        except ValueError as error:
            if self._not_understood != str(error):
                self._not_understood = str(error)
                logger.warning(
                    "%s: what the server tells of its cluster is not followed: %s",
                    self.__name__,
                    error,
                )
            return
        self._not_understood = None
        known = self._topology
        if known is not None and known.cluster_id != topology.cluster_id:
            logger.error(
                "%s: the server %s belongs to cluster %r (%s), the former one to %r (%s): it is "
                "left. Is one of the addresses wrong?",
                self.__name__,
                self._server_addr,
                topology.cluster,
                topology.cluster_id,
                known.cluster,
                known.cluster_id,
            )
            # ZEO has compared its cache with that server already.
            self._cache.clear()
            if self._transport is not None:
                self._transport.abort()
            return
        self._topology = topology = topology.completed_by(known)
        addresses = self._preference.addresses(topology)
        if not addresses:
            return
        if not self._preference.reads_only:
            # A name, or an address that moves, may lead to nodes that nobody has told of.
            addresses += [seed for seed in self._seeds if seed not in addresses]
        if set(addresses) != set(self._known):
            self._known = addresses
        if self._loop is not None:
            # ZEO is not through with a connection that it has just told of.
            self._loop.call_soon(self._follow)
        if self._preference.reads_only and not self._looking:
            self._look_later()

    def _look_later(self) -> None:
        """Has a reader look for a node that it prefers to the one that it uses."""
        if self._loop is not None:
            self._looking = True
            self._loop.call_later(self._look_after, self._look)

    def _look(self) -> None:
        """Begins a look; `_looked` gets what it found."""
        topology, transport, loop = self._topology, self._transport, self._loop
        if topology is None or transport is None or loop is None or self._conn.closed:
            # The next connection looks again.
            self._looking = False
            return
        wanted = self._preference.addresses(topology)
        peer = transport.get_extra_info("peername")

        def look() -> None:
            better = bool(wanted) and not _is_one_of(peer, wanted)
            found = better and any(_greets(address, self._encrypted) for address in wanted)
            # A storage that is closed meanwhile has no loop.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._looked, topology, transport, better, found)

        # Names and connections may take their time, in which ZEO goes on.
        threading.Thread(target=look, name=f"{self.__name__} looks for a node", daemon=True).start()

    def _looked(
        self, topology: Topology, transport: asyncio.Transport, better: bool, found: bool
    ) -> None:
        if self._transport is transport and found:
            self._leave(transport, round(LOOK / QUIET))
        elif better or self._topology is not topology:
            self._look_later()
        else:
            self._looking, self._look_after = False, LOOK

    def _leave(self, transport: asyncio.Transport, looks: int) -> None:
        """Has a reader leave its node in a moment in which no call waits for its answer."""
        lost = self._transport is not transport or not self._conn.operational
        if lost or self._loop is None or looks == 0:
            self._look_later()
        elif self._conn.protocol.futures:
            self._loop.call_later(QUIET, self._leave, transport, looks - 1)
        else:
            self._looking, self._look_after = False, min(2 * self._look_after, RARELY)
            # They are all addresses that it knew, if it found nothing that it prefers.
            self._conn.new_addrs(self._known)
            logger.info("%s leaves %s for one of %s", self.__name__, self._server_addr, self._known)
            transport.abort()

    def _follow(self) -> None:
        """Has ZEO use the addresses that follow from the cluster for its next connection.

        While ZEO connects, a new list would have it forget a connection that it verifies, and not
        close it: two would tell it of transactions then. The list waits for the next connection.
        """
        if not self._conn.trying_to_connect() and self._conn.addrs != self._known:
            self._conn.new_addrs(self._known)
            logger.info("%s follows the cluster: %s", self.__name__, self._known)

    def _widen(self) -> None:
        """Has a reader that finds no node that it prefers go to any that it knows."""
        if self._conn.closed or self._conn.operational or self._loop is None:
            return
        if self._conn.protocol is None:
            addresses = self._everywhere()
            self._conn.new_addrs(addresses)
            logger.info("%s goes wherever it can: %s", self.__name__, addresses)
        else:
            # It has found one just now, which may not come to anything.
            self._loop.call_later(WIDEN, self._widen)

    def _everywhere(self) -> list[Address]:
        """All addresses that may lead to the cluster, those of nodes that are preferred first."""
        topology = self._topology
        known: list[Address | None] = []
        if topology is not None:
            known += self._preference.addresses(topology)
            known += [node.read_only_address or node.address for node in topology.nodes]
        return list(dict.fromkeys(each for each in [*known, *self._seeds] if each is not None))

    # Called by whoever opens the storage.

    def _move(self) -> None:
        """Has a reader leave a node that it does not prefer, if there is one that it does."""
        deadline = time.monotonic() + MOVE
        generation = self._connection_generation
        topology, transport = self._topology, self._transport
        if topology is None or transport is None:
            return
        wanted = self._preference.addresses(topology)
        if not wanted or _is_one_of(transport.get_extra_info("peername"), wanted):
            return
        if self._loop is not None:
            self._loop.call_soon_threadsafe(transport.abort)
        while time.monotonic() < deadline:
            if self._connection_generation > generation and self.is_connected():
                return
            time.sleep(0.01)

    @staticmethod
    def _listed(addr: int | Address | Sequence[Address]) -> list[Address]:
        match addr:
            case int():
                return [("127.0.0.1", addr)]
            case str():
                return [addr]
            case (str(host), int(port)):
                return [(host, port)]
        return list(addr)


def _transport(conn: Any) -> asyncio.Transport | None:
    """The transport of ZEO's connection: where it is depends on ZEO's version."""
    protocol = conn.protocol
    for owner in (getattr(protocol, "sm_protocol", None), protocol):
        transport = getattr(owner, "transport", None)
        if transport is not None:
            return transport  # type: ignore[no-any-return]
    return None


def _keep_alive(transport: asyncio.Transport) -> None:
    """Has the system notice a host that vanishes: what is not on TCP cannot."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = [
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", IDLE),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", UNANSWERED),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", PATIENCE),
    ]
    # What an event loop gives out need not be a whole socket.
    with socket.socket(fileno=os.dup(sock.fileno())) as same:
        for level, name, value in options:
            # Not every system has each of them.
            if hasattr(socket, name):
                same.setsockopt(level, getattr(socket, name), value)


def _is_one_of(peer: Any, addresses: list[Address]) -> bool:
    """True if a connection with this other side may be one to these addresses."""
    return peer is None or any(peer[:2] in _resolved(address) for address in addresses)


def _resolved(address: Address) -> set[tuple[str, int]]:
    """What a connection to an address may have as its other side."""
    if isinstance(address, str):
        return set()
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {(str(each[4][0]), address[1]) for each in found}


def _greets(address: Address, encrypted: bool) -> bool:
    """True if a server speaks first, as those of ZEO do; with TLS, if one accepts a connection."""
    if isinstance(address, str):
        return False
    try:
        with socket.create_connection(address, timeout=REACH) as sock:
            return encrypted or sock.recv(1) != b""
    except OSError:
        return False
