"""A ZODB client storage for Standby.

``ClientStorage`` takes the arguments of ZEO's. While it is open it follows the cluster: nodes that
come and go, and their addresses, reach it over its connection. Of a server that is no Standby it
behaves as ZEO's.

If the connection breaks while a transaction commits, the storage asks the cluster what became of
it: a commit that succeeded is no error, and one that did not raises ``NotCommittedError``, after
which it may be tried again.
"""

from standby_zodb.outcome import NotCommittedError, OutcomeUnknownError
from standby_zodb.storage import ClientStorage
from standby_zodb.topology import Address, Node, Topology

__all__ = [
    "Address",
    "ClientStorage",
    "Node",
    "NotCommittedError",
    "OutcomeUnknownError",
    "Topology",
]
