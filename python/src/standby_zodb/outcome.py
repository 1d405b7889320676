"""What became of a transaction whose client lost its connection while it committed."""

from __future__ import annotations

import os

from ZEO.Exceptions import ClientDisconnected, ClientStorageError

ASK_FOR = 60.0
"""Seconds within which a node of the cluster must say what became of a transaction."""
PAUSE = 0.05
"""Seconds between two questions."""


class NotCommittedError(ClientDisconnected):  # type: ignore[misc]
    """The connection broke during the commit, and the transaction is not committed.

    It never will be: it may be tried again, as frameworks do with every ``TransientError``.
    """


class OutcomeUnknownError(ClientStorageError):  # type: ignore[misc]
    """The connection broke during the commit, and nobody knows whether it succeeded.

    This is no ``TransientError``: if the transaction is committed, another attempt would commit it
    twice.
    """


class Naming:
    """Gives each transaction of a storage a token.

    Those of one name are numbered, and the next one begins when the outcome of the last one is
    known. After a transaction whose outcome is not known the next one has a new name. The storage
    holds its commit lock while it uses this.
    """

    def __init__(self) -> None:
        self._name = os.urandom(16)
        self._number = 0
        self._settled = True

    def next(self) -> bytes:
        """Names a transaction that begins."""
        if not self._settled:
            self._name, self._number, self._settled = os.urandom(16), 0, True
        self._number += 1
        return self._name + self._number.to_bytes(8, "big")

    def finishing(self) -> None:
        """Notes that the transaction may be committed from now on."""
        self._settled = False

    def finished(self) -> None:
        """Notes that it is committed."""
        self._settled = True
