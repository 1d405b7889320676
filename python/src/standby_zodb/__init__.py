"""A ZODB client storage for Standby.

``ClientStorage`` takes the arguments of ZEO's. While it is open it follows the cluster: nodes that
come and go, and their addresses, reach it over its connection. Of a server that is no Standby it
behaves as ZEO's.
"""

from standby_zodb.storage import ClientStorage
from standby_zodb.topology import Address, Node, Topology

__all__ = ["Address", "ClientStorage", "Node", "Topology"]
