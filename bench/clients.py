"""How long clients wait for their next commit when something happens to the cluster, and which errors they see.

    python bench/clients.py [--rounds 10] [--changes kill stop switchover freeze supervised vanish partition replace]

needs root, the program (cargo build --release), a Python with ZEO, iproute2, and standby_zodb if it is to be measured. Three
nodes and the clients are on machines of their own (network namespaces). Clients of six kinds commit at the same time, each
every 20 ms on an object of its own:

    all addresses    ZEO's own client with the addresses of all nodes, each in a line of its own
    one address      the same with that of one node, which is never the one that something happens to
    one name         with a name that leads to all nodes
    moving address   with a virtual address, which the command on-primary moves
    router           with that of `standby router` on the clients' machine
    standby_zodb     the storage of that package with the address of one node

    kill             kill -9 of the primary
    stop             SIGTERM to the primary
    switchover       to another node
    freeze           SIGSTOP to the primary; SIGCONT after all have committed
    supervised       SIGSTOP to a primary that runs with --supervise
    vanish           the primary's machine is cut off: no connection is closed
    partition        the clients' machine is cut off for five seconds; the time is that since the end
    replace          three new nodes are added and the old ones removed, the router's and the package's address among
                     them; then the new primary is killed

The time is that between two replies to commits, the longest one around the change. "Errors" are the exceptions that the
application sees; it tries again at once. Who waits for more than 30 s is given up.
"""

import argparse
import functools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "tests"))

import conftest  # noqa: E402, F401  (quiet logs)
import cluster as harness  # noqa: E402
import transaction  # noqa: E402
import ZODB  # noqa: E402
from persistent.mapping import PersistentMapping  # noqa: E402
from places import Places, moving  # noqa: E402
from test_membership import replace_all  # noqa: E402
from zeo_client import is_passing, open_storage  # noqa: E402

try:
    import standby_zodb
except ImportError:
    standby_zodb = None

PATIENCE = 30
PAUSE = 0.02
PARTITION = 5
NAME = "cluster.example"
# Where each node listens besides its own port, and the address that moves.
PORT = 8100
MOVING = "10.77.0.100"
NODES = ["n1", "n2", "n3", "n4", "n5", "n6"]


class Client:
    """Commits in a thread until it is closed; what hangs is left alone."""

    def __init__(self, make):
        self.errors, self.replies = 0, []
        self.closing, self.key = False, None
        self.manager = transaction.TransactionManager()
        self.db = ZODB.DB(make())
        self.connection = self.db.open(self.manager)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def commit(self):
        self.manager.begin()
        root = self.connection.root()
        if self.key is None:
            root[id(self)] = PersistentMapping(number=0)
        else:
            root[self.key]["number"] += 1
        self.manager.commit()
        self.key = id(self)

    def run(self):
        while not self.closing:
            try:
                self.commit()
                self.replies.append(time.monotonic())
                time.sleep(PAUSE)
            except Exception as error:
                self.manager.abort()
                if not is_passing(error):
                    raise
                self.errors += 1
                time.sleep(0.005)
        self.manager.abort()
        self.connection.close()
        self.db.close()

    def begin(self):
        """Forgets the replies but the last, and the errors."""
        self.errors, self.replies = 0, self.replies[-1:]

    def commits(self, count, deadline):
        """Waits for so many replies; False if they have not come at the deadline."""
        while len(self.replies) < count:
            if time.monotonic() > deadline or not self.thread.is_alive():
                return False
            time.sleep(0.005)
        return True

    def longest(self, since):
        """The longest time between two replies; with `since`, that from there to the next one."""
        if since is not None:
            return next(reply for reply in self.replies if reply > since) - since
        return max(later - reply for reply, later in zip(self.replies, self.replies[1:]))


class Site:
    """A cluster, a router, and a client of each kind on a machine of their own."""

    def __init__(self, directory, arguments=()):
        self.world = world = Places(["office", *NODES])
        self.hosts = os.path.join(directory, "hosts")
        # Not in their order: the first one may be the one that is down.
        self.name(["n3", "n1", "n2"])
        self.zeo = "  address %d" % PORT
        self.cluster = harness.Cluster(
            os.path.join(directory, "cluster"), places=world, options=moving(MOVING), zeo=self.zeo, arguments=arguments
        )
        everywhere, one = self.cluster.addresses, self.cluster.addresses[:1]
        within = world.command("office")
        self.router = harness.Router(os.path.join(directory, "router"), one, within=within)
        stock = {
            "all addresses": everywhere,
            "one address": one,
            "one name": [(NAME, PORT)],
            "moving address": [(MOVING, PORT)],
            "router": [self.router.writes],
        }
        self.kinds = {kind: functools.partial(open_storage, where) for kind, where in stock.items()}
        if standby_zodb is not None:
            self.kinds["standby_zodb"] = lambda: standby_zodb.ClientStorage(
                one, wait_timeout=PATIENCE, server_sync=True
            )
        self.clients = {}

    def name(self, names):
        """Has the name lead to these nodes."""
        with open(self.hosts, "w") as file:
            file.writelines("%s %s\n" % (self.world.hosts[name], NAME) for name in names)

    def start(self):
        self.cluster.start()
        self.router.start()

    def close(self):
        for client in self.clients.values():
            # Those that hang end when there is nobody any more.
            client.closing = True
        self.router.kill()
        for node in self.cluster.nodes:
            node.kill()
        self.world.close()

    def round(self, change):
        """Makes a change while all commit; returns what each client waited, and its errors. `change` returns the moment
        from which the time counts, or None: that of the last reply before."""
        for kind, make in self.kinds.items():
            if kind not in self.clients:
                self.clients[kind] = Client(make)
        deadline = time.monotonic() + PATIENCE
        for kind, client in self.clients.items():
            assert client.commits(len(client.replies) + 2, deadline), "%s does not commit" % kind
        for client in self.clients.values():
            client.begin()
        since = change()
        seen = {}
        deadline = time.monotonic() + PATIENCE
        counts = {kind: len(client.replies) + 2 for kind, client in self.clients.items()}
        for kind, client in list(self.clients.items()):
            if client.commits(counts[kind], deadline):
                seen[kind] = client.longest(since), client.errors
            else:
                seen[kind] = PATIENCE, client.errors
                # Another one takes its place.
                self.clients.pop(kind).closing = True
        return seen

    def make_primary(self, node):
        """A node that has vanished again and again does not stand for a minute."""
        for attempt in range(25):
            try:
                return self.cluster.make_primary(node)
            except AssertionError:
                if attempt == 24:
                    raise
                time.sleep(3)


def kill(site, primary):
    seen = site.round(primary.kill)
    primary.start()
    return seen


def stop(site, primary):
    def change():
        primary.stop()

    seen = site.round(change)
    primary.start()
    return seen


def switchover(site, primary):
    def change():
        primary.ask("switchover")

    return site.round(change)


def freeze(site, primary):
    seen = site.round(lambda: primary.signal(signal.SIGSTOP))
    primary.signal(signal.SIGCONT)
    return seen


def supervised(site, primary):
    return site.round(lambda: os.kill(primary.child(), signal.SIGSTOP))


def vanish(site, primary):
    seen = site.round(lambda: site.world.cut(primary.name))
    site.world.heal(primary.name)
    return seen


def partition(site, _primary):
    def change():
        site.world.cut("office")
        time.sleep(PARTITION)
        site.world.heal("office")
        return time.monotonic()

    return site.round(change)


def replace(site, _primary):
    cluster = site.cluster

    def options(name):
        return dict(zeo=site.zeo, **harness.Cluster.place(site.world, "here", int(name[1:])))

    def change():
        replace_all(cluster, options)
        site.name(NODES[3:])
        # Topology is told within a second.
        time.sleep(1)
        cluster.primary().kill()

    return site.round(change)


CHANGES = {
    one.__name__: one for one in (kill, stop, switchover, freeze, supervised, vanish, partition, replace)
}


def rounds_of(change, count):
    """What is seen in each round of a change."""
    left = count
    while left > 0:
        directory = tempfile.mkdtemp(prefix="standby-bench-")
        site = Site(directory, ["--supervise"] if change is supervised else [])
        try:
            site.world.run("office", site.start, hosts=site.hosts)
            # A cluster whose nodes are replaced is another one.
            for _ in range(1 if change is replace else left):
                # Never the node whose address is the only one.
                primary = site.cluster.nodes[1 + left % 2]
                seen = []

                def one():
                    site.make_primary(primary)
                    seen.append(change(site, primary))
                    if change is not replace:
                        site.cluster.wait_healthy()

                site.world.run("office", one, hosts=site.hosts)
                yield seen[0]
                left -= 1
        finally:
            site.close()
            shutil.rmtree(directory, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how often each change is made (10)")
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), help="which (all)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    print("%-11s %-15s %9s %9s %9s  %s" % ("change", "client", "median", "best", "worst", "errors"))
    for name in options.changes:
        rounds = list(rounds_of(CHANGES[name], options.rounds))
        for kind in rounds[0]:
            waited = sorted(seen[kind][0] for seen in rounds)
            figures = [
                "%.0f ms" % (1000 * t) if t < PATIENCE else "> %d s" % PATIENCE
                for t in (statistics.median(waited), waited[0], waited[-1])
            ]
            errors = sum(seen[kind][1] for seen in rounds)
            print("%-11s %-15s %9s %9s %9s  %d" % (name, kind, *figures, errors), flush=True)


if __name__ == "__main__":
    main()
