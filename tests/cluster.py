"""Real nodes for the tests: processes, ports, configuration files, kills.

Works with every version of ZODB and ZEO that the tests use; imports neither.
"""

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
STANDBY = os.environ.get("STANDBY", os.path.join(HERE, "..", "target", "release", "standby"))


def ports():
    """All are below those that the system gives to outgoing connections, which could take the port of a node that is
    down, and apart from those that the suites of ZEO draw (20000 to 30000)."""
    mine = [*range(10000 + SHARE, 20000, SHARES), *range(30000 + SHARE, 32768, SHARES)]
    random.shuffle(mine)
    return itertools.cycle(mine)


# Processes that share the tests, and what runs beside them, have a share of the ports each.
SHARES = 8
SHARE = int(os.environ.get("SHARE_OF_PORTS", os.environ.get("PYTEST_XDIST_WORKER", "gw-1")[2:])) + 1
PORTS = ports()


def free_ports(count):
    """Ports of 127.0.0.1 on which nobody listens."""
    ports = []
    while len(ports) < count:
        port = next(PORTS)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
    return ports


def wait_for(what, condition, timeout=30, poll=0.05):
    """Waits until condition() is true and returns its value."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("not within %s s: %s" % (timeout, what))
        time.sleep(poll)


class Process:
    """A server in a process of its own, ended by its id."""

    process = None

    def __init__(self, directory):
        self.directory = str(directory)
        os.makedirs(self.directory, exist_ok=True)
        self.log_path = os.path.join(self.directory, "log.txt")

    def command(self):
        raise NotImplementedError

    def start(self):
        assert self.process is None
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return log.read()

    def signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        """As a power cord would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self):
        """In an orderly way; returns the exit status."""
        if self.process is None:
            return None
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.process = None
        assert "panicked" not in self.log(), self.log()[-3000:]
        return status

    def wait(self, timeout=30):
        """Waits until it ends by itself; returns the exit status."""
        status = self.process.wait(timeout=timeout)
        self.process = None
        return status


class Node(Process):
    """A Standby node, alone or in a cluster."""

    def __init__(
        self,
        directory,
        name="alone",
        ports=None,
        zeo="",
        data_file=None,
        blobs=False,
        group="here",
        witness=False,
        host="127.0.0.1",
        within=(),
        arguments=(),
    ):
        """`within` is a command that stands before the node's own, as `ip netns exec`."""
        super().__init__(directory)
        self.host, self.within, self.arguments = host, list(within), list(arguments)
        self.name = name
        self.group = group
        self.witness = witness
        ports = ports or free_ports(4)
        self.port, self.read_only_port, self.peer_port, self.admin_port = ports
        self.address = (host, self.port)
        self.read_only_address = (host, self.read_only_port)
        self.data_file = data_file or os.path.join(self.directory, "Data.fs")
        self.state_dir = os.path.join(self.directory, "state")
        self.config_path = os.path.join(self.directory, "zeo.conf")
        self.zeo = zeo
        self.blob_dir = os.path.join(self.directory, "blobs") if blobs else None
        self.configure("")

    def configure(self, standby):
        blobs = "  blob-dir %s\n" % self.blob_dir if self.blob_dir else ""
        with open(self.config_path, "w") as config:
            if self.witness:
                config.write(standby)
                return
            config.write(
                "<zeo>\n  address %s:%s\n%s\n</zeo>\n"
                "<filestorage>\n  path %s\n%s</filestorage>\n%s"
                % (self.host, self.port, self.zeo, self.data_file, blobs, standby)
            )

    def join(self, cluster, lines, options=""):
        """Writes the configuration of a member; `lines` say how it finds the others."""
        self.configure(
            "<standby>\n  cluster %s\n  node %s\n  group %s\n  state-dir %s\n  peer-address %s:%s\n"
            "  admin-address %s:%s\n%s%s%s</standby>\n"
            % (
                cluster,
                self.name,
                self.group,
                self.state_dir,
                self.host,
                self.peer_port,
                self.host,
                self.admin_port,
                lines,
                options,
                "  witness on\n"
                if self.witness
                else "  read-only-address %s:%s\n" % self.read_only_address,
            )
        )

    def command(self):
        return self.within + [STANDBY, "serve", "-C", self.config_path] + self.arguments

    def child(self):
        """The process id of the node that a supervisor watches."""
        pid = self.process.pid

        def find():
            with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
                return [int(word) for word in file.read().split()]

        return wait_for("a child", find)[0]

    def ask(self, *words, fails=False, timeout=60):
        """Runs an administrator's command; returns what it prints."""
        command = [STANDBY, *words, "--at", "%s:%s" % (self.host, self.admin_port)]
        for _ in range(3):
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            # A machine or a disk that is busy with other tests may take longer than an election does. The old primary
            # goes on then, and an administrator asks again.
            slow = "did not take the primary's role" in done.stderr or "ask again" in done.stderr
            if fails or words[0] != "switchover" or done.returncode == 0 or not slow:
                break
        # A busy machine may need longer for a new timeline than the command waits: the cluster goes on, and so do tests.
        begun = "the cluster goes on trying" in done.stderr
        assert (done.returncode != 0 and not begun) == fails, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def status(self):
        """The cluster as this node sees it, or None."""
        try:
            url = "http://%s:%s/status" % (self.host, self.admin_port)
            with urllib.request.urlopen(url, timeout=2) as answer:
                return json.load(answer)
        except OSError:
            return None

    def metric(self, name):
        """A number that the node shows to monitoring systems."""
        url = "http://%s:%s/metrics" % (self.host, self.admin_port)
        with urllib.request.urlopen(url, timeout=10) as page:
            lines = page.read().decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def listens(self):
        try:
            socket.create_connection(self.address, timeout=1).close()
            return True
        except OSError:
            return False


class Router(Process):
    """A router with an address for each kind of client, and one for metrics."""

    def __init__(self, directory, nodes, arguments=(), within=(), writes=None):
        super().__init__(directory)
        ports = free_ports(3)
        self.writes = writes or ("127.0.0.1", ports[0])
        self.reads, self.metrics = [("127.0.0.1", port) for port in ports[1:]]
        self.arguments = [word for node in nodes for word in ("--node", "%s:%s" % node)] + list(arguments)
        self.within = list(within)

    def command(self):
        writes = self.writes if isinstance(self.writes, str) else "%s:%s" % self.writes
        addresses = ["--writes", writes, "--reads", "%s:%s" % self.reads, "--metrics", "%s:%s" % self.metrics]
        return [*self.within, STANDBY, "router", *addresses, *self.arguments]

    def get(self, path):
        """The status and the text of a page."""
        url = "http://%s:%s%s" % (*self.metrics, path)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name, **labels):
        """The sum of a metric over what has these labels."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith("standby_router_" + name)]
        wanted = ['%s="%s"' % label for label in labels.items()]
        return sum(float(line.rsplit(None, 1)[1]) for line in lines if all(label in line for label in wanted))


def token_of(printed):
    """The join token that `node add` has printed."""
    return printed.split("join-token")[1].split()[0]


class Cluster:
    """Nodes of a cluster: n1, n2, … of the groups given, the first of which is the fail-over group. The
    group "witness" makes a witness."""

    def __init__(
        self,
        directory,
        count=3,
        zeo="",
        options="",
        blobs=False,
        groups=None,
        places=None,
        arguments=(),
        secret=False,
    ):
        """With `places`, each node is in the place of its name if there is one, else in that of its group; they share a
        secret then, or with `secret`. `arguments` are those of serve."""
        self.directory = str(directory)
        groups = groups or ["here"] * count
        self.failover = groups[0]
        self.nodes = [
            Node(
                os.path.join(self.directory, "n%d" % number),
                "n%d" % number,
                zeo=zeo,
                blobs=blobs,
                group=group,
                witness=group == "witness",
                arguments=arguments,
                **self.place(places, group, number),
            )
            for number, group in enumerate(groups, 1)
        ]
        if places or secret:
            path = os.path.join(self.directory, "secret")
            with open(path, "w") as file:
                file.write("as good as any secret of 32 bytes")
            options += "  secret-file %s\n" % path
        self.options = options
        self.configure()

    def configure(self):
        """Writes the configurations; again if a disk has been put over a directory."""
        members = "".join(
            "  member %s %s:%s %s%s\n"
            % (node.name, node.host, node.peer_port, node.group, " witness" if node.witness else "")
            for node in self.nodes
        )
        for node in self.nodes:
            node.join("test", members, self.options)

    @staticmethod
    def place(places, group, number):
        if places is None:
            return {}
        ports = [base + number for base in (8100, 8200, 8300, 8400)]
        place = "n%d" % number
        place = place if place in places.hosts else group
        return dict(host=places.hosts[place], within=places.command(place), ports=ports)

    @property
    def addresses(self):
        return [node.address for node in self.nodes if not node.witness]

    @property
    def voters(self):
        return [n for n in self.nodes if n.witness or n.group == self.failover]

    def invited(self, directory, name, printed, **options):
        """A node that joins as `node add` has said; it is not started."""
        node = Node(directory, name, **options)
        peer = printed.split("join  ")[1].split()[0]
        node.join("test", "  join %s\n  join-token %s\n" % (peer, token_of(printed)), self.options)
        self.nodes.append(node)
        return node

    def start(self):
        for node in self.nodes:
            node.start()
        self.wait_healthy()
        return self

    def stop(self):
        for node in self.nodes:
            node.stop()

    def running(self):
        return [node for node in self.nodes if node.process is not None]

    def named(self, name):
        return next(node for node in self.nodes if node.name == name)

    def status(self):
        """The picture of the node that knows most."""
        pictures = [p for p in (node.status() for node in self.running()) if p]
        return max(pictures, key=lambda p: (p["primary"] is not None, p["term"]), default=None)

    def primary(self, timeout=30):
        """The primary, as soon as there is one among the running nodes."""

        def find():
            running = self.running()
            for node in running:
                picture = node.status()
                if picture and picture["primary"] == node.name:
                    return node

        try:
            return wait_for("a primary", find, timeout)
        except AssertionError:
            raise AssertionError(self.logs())

    def make_primary(self, node):
        if self.primary() is not node:
            node.ask("switchover", "--to", node.name)

    def seen(self, node, by=None):
        """What is said of a node, by another one or by the one that knows most."""
        picture = by.status() if by else self.status()
        return next(n for n in picture["nodes"] if n["node"] == node.name)

    def wait_healthy(self, timeout=60):
        """Until all nodes are up and not behind, and those that are to vote do."""

        def healthy():
            picture = self.status()
            if not picture or picture["primary"] is None:
                return False
            up = {n["node"]: n for n in picture["nodes"] if n["state"] == "up"}
            voters = {name for name, node in up.items() if node["voter"]}
            return (
                set(up) == {node.name for node in self.nodes}
                and voters == {node.name for node in self.voters}
                and all(n["lag_seconds"] <= 1 for n in up.values())
            )

        try:
            wait_for("a healthy cluster", healthy, timeout)
        except AssertionError:
            raise AssertionError("%s\n%s" % (self.status(), self.logs()))

    def wait_level(self, timeout=60):
        """Until all nodes stand at the same transaction; nobody may be writing."""

        def level():
            picture = self.status()
            data = [n for n in picture["nodes"] if n["role"] != "witness"] if picture else []
            return len({json.dumps(n["last_tid"]) for n in data}) == 1

        # Nodes report twice a second: what was committed just before is in the reports that come now.
        time.sleep(0.7)
        self.wait_healthy(timeout)
        wait_for("nodes that are level", level, timeout)

    def logs(self):
        return "\n".join("%s:\n%s" % (node.name, node.log()[-3000:]) for node in self.nodes)
