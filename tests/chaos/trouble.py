"""What goes wrong with the machines of a cluster. Each trouble is a function of World that begins it; what it returns
ends it."""

import collections
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading

import cluster as harness
from faults import Faults
from places import Places
from test_disks import fill, small_disk

DISK_MB = 700
# With more files and connections a node refuses.
DESCRIPTORS = 512
# What of a node's directory is not on the disk that is lost.
SETTINGS = ("zeo.conf", "ballast")
# Connections that say nothing, until it is killed, or standard input ends.
SILENT = """
import socket, sys
held = []
for port in sys.argv[2:]:
    for _ in range(200):
        try:
            held.append(socket.create_connection((sys.argv[1], int(port)), 2))
        except OSError:
            break
sys.stdin.read()
"""
CLIENTS = "clients"
OFFICE = "office"


class Machine:
    """A node, its place, its disk and its faults."""

    def __init__(self, directory, node):
        self.node, self.name = node, node.name
        # So many troubles want it to be down.
        self.held = 0
        self.shim = Faults(os.path.join(directory, self.name + ".machine"))
        limit = ["prlimit", "--nofile=%d:%d" % (DESCRIPTORS, DESCRIPTORS)]
        node.within = node.within + limit + self.shim.within
        # Not on the disk that fills up.
        node.log_path = os.path.join(directory, self.name + ".txt")
        self.lines = collections.Counter()

    def fault(self, line):
        """Adds a line to the shim's; the result takes it away."""
        self.lines[line] += 1
        self.shim.set(*self.lines.elements())

        def end():
            self.lines[line] -= 1
            self.shim.set(*self.lines.elements())

        return end

    def down(self, stop):
        """Ends it with `stop`; the result starts it again if nobody else wants it to be down."""
        self.held += 1
        stop()

        def end():
            self.held -= 1
            self.ensure_running()

        return end

    def empty(self):
        """Its disk has nothing on it any more."""
        for name in os.listdir(self.node.directory):
            path = os.path.join(self.node.directory, name)
            if name in SETTINGS:
                continue
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.remove(path)

    def ensure_running(self):
        """True if it had ended by itself."""
        ended = self.node.process is not None and self.node.process.poll() is not None
        if ended:
            self.node.process = None
        if self.node.process is None and not self.held:
            self.node.start()
        return ended


class World:
    """Machines on a switch, each with a cable of its own; the place of the clients; and the administrator's."""

    def __init__(self, directory, groups, options, chance):
        self.chance = chance
        self.counts = collections.Counter()
        # A disk has been lost since all was whole: what two of three have acknowledged may be on one more only.
        self.lost_disk = False
        # Begins a client's pack, as a process.
        self.start_pack = None
        self.stack = contextlib.ExitStack()
        names = ["n%d" % number for number in range(1, len(groups) + 1)]
        self.places = Places([OFFICE, CLIENTS, *names], {name: 0 for name in [CLIENTS, *names]})
        self.stack.callback(self.places.close)
        try:
            for name in names:
                self.stack.enter_context(small_disk(os.path.join(directory, name), DISK_MB))
            self.cluster = harness.Cluster(
                directory,
                groups=groups,
                places=self.places,
                blobs=True,
                options=options,
                arguments=["--supervise", "--frozen-after", "2"],
            )
            self.machines = [Machine(directory, node) for node in self.cluster.nodes]
            # From whom each place takes nothing.
            self.deaf = {name: collections.Counter() for name in [CLIENTS, *names]}
            for name in self.deaf:
                self.filter(name)
        except BaseException:
            self.stack.close()
            raise

    def close(self, keep=False):
        """Ends all nodes. `keep` copies what is on their disks, which go."""
        for machine in self.machines:
            machine.node.kill()
            if keep:
                directory = machine.node.directory
                shutil.copytree(directory, directory + ".kept", ignore=shutil.ignore_patterns("ballast"))
        self.stack.close()

    def filter(self, name):
        """What comes from these places is lost without a word."""
        hosts = ", ".join(self.places.hosts[other] for other in +self.deaf[name])
        rules = "table ip chaos {\n chain input {\n type filter hook input priority 0;\n %s\n }\n}\n" % (
            "ip saddr { %s } drop" % hosts if hosts else ""
        )
        # Defined, emptied and defined anew, in one go.
        rules = "table ip chaos {\n}\ndelete table ip chaos\n" + rules
        subprocess.run([*self.places.command(name), "nft", "-f", "-"], input=rules.encode(), check=True)

    def block(self, ways):
        """Nothing gets from the first to the second of each way."""
        for sender, receiver in ways:
            self.deaf[receiver][sender] += 1
        touched = sorted({receiver for _, receiver in ways})
        for receiver in touched:
            self.filter(receiver)

        def end():
            for sender, receiver in ways:
                self.deaf[receiver][sender] -= 1
            for receiver in touched:
                self.filter(receiver)

        return end

    def half_open(self, pid):
        """The connections of a client's process of which the machine on the other side does not know."""

        def connections(place, *more):
            listed = subprocess.run(
                [*self.places.command(place), "ss", "-Htn", *more], check=True, capture_output=True, text=True
            )
            return [line.split() for line in listed.stdout.splitlines()]

        known = set()
        for machine in self.machines:
            known.update((there, here) for _, _, _, here, there, *_ in connections(machine.name))
        mine = connections(CLIENTS, "-p", "state", "established")
        mine = [(here, there) for _, _, here, there, *who in mine if "pid=%d," % pid in " ".join(who)]
        return ["%s to %s" % ends for ends in mine if ends not in known]

    @property
    def everybody(self):
        return [machine.name for machine in self.machines] + [CLIENTS]

    def primary(self):
        """The machine of the primary, or any if there is none that tells."""
        picture = self.cluster.status() or {}
        name = picture.get("primary") or self.chance.choice(self.machines).name
        return next(machine for machine in self.machines if machine.name == name)

    def some(self):
        """A machine: often the primary's, where trouble hurts most."""
        if self.chance.random() < 0.5:
            return self.primary()
        return self.chance.choice(self.machines)

    # The troubles.

    def kill(self):
        machine = self.some()
        return machine.down(machine.node.kill)

    def kill_all(self):
        ends = [machine.down(machine.node.kill) for machine in self.machines]
        return lambda: [end() for end in ends]

    def restart(self):
        machine = self.some()

        def stop():
            machine.ensure_running()
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Not orderly if its disk is full or does not answer.
                machine.node.stop()

        return machine.down(stop)

    def vanish(self):
        """A host is gone from one moment to the next: nobody whom it was connected to hears of it."""
        machine = self.some()
        self.places.cut(machine.name)
        up = machine.down(machine.node.kill)

        def end():
            self.places.heal(machine.name)
            up()

        return end

    def lose_disk(self):
        """A machine comes back with an empty disk."""
        if self.lost_disk:
            return lambda: None
        self.lost_disk = True
        machine = self.some()

        def stop():
            machine.node.kill()
            machine.empty()

        self.counts["disks that were lost"] += 1
        return machine.down(stop)

    def put_back(self):
        """A disk is put back to what it was some seconds ago."""
        if self.lost_disk:
            return lambda: None
        self.lost_disk = True
        machine = self.some()
        snapshot = machine.node.directory + ".snapshot"
        shutil.rmtree(snapshot, ignore_errors=True)

        def keep():
            machine.node.kill()
            shutil.copytree(machine.node.directory, snapshot, ignore=shutil.ignore_patterns(*SETTINGS))

        machine.down(keep)()

        def restore():
            machine.node.kill()
            machine.empty()
            shutil.copytree(snapshot, machine.node.directory, dirs_exist_ok=True)

        def end():
            self.counts["disks that were put back"] += 1
            machine.down(restore)()

        return end

    def freeze(self):
        """Its supervisor kills what stands still for two seconds."""
        machine = self.some()
        try:
            pid = machine.node.child()
            os.kill(pid, signal.SIGSTOP)
        except (AssertionError, AttributeError, OSError):
            return lambda: None

        def end():
            with contextlib.suppress(AssertionError, AttributeError, OSError):
                if machine.node.child() == pid:
                    os.kill(pid, signal.SIGCONT)

        return end

    def unplug(self):
        """The link of a machine is down."""
        name = self.some().name
        self.places.cut(name)
        return lambda: self.places.heal(name)

    def isolate(self):
        """The primary hears no other node, nor they it; its clients do."""
        name = self.primary().name
        others = [other.name for other in self.machines if other.name != name]
        return self.block([(name, other) for other in others] + [(other, name) for other in others])

    def one_way(self):
        """A machine hears nobody, or nobody hears it."""
        name = self.some().name
        others = [other for other in self.everybody if other != name]
        if self.chance.random() < 0.5:
            return self.block([(name, other) for other in others])
        return self.block([(other, name) for other in others])

    def split(self):
        """Two sides."""
        side = {name: self.chance.random() < 0.5 for name in self.everybody}
        ways = [(a, b) for a in side for b in side if side[a] != side[b]]
        return self.block(ways)

    def pair(self):
        """Two machines do not hear each other; all others hear both."""
        one, other = self.chance.sample([machine.name for machine in self.machines], 2)
        return self.block([(one, other), (other, one)])

    def swallow(self):
        """What a machine's connections to other nodes carry is lost; new connections work."""
        name = self.some().name
        self.places.swallow(name, "830")
        return lambda: self.places.unswallow(name)

    def strangers(self):
        """Connections to all ports of a machine that ask for nothing, more than it may have descriptors."""
        node = self.some().node
        ports = [str(port) for port in (node.port, node.read_only_port, node.peer_port, node.admin_port)]
        crowd = subprocess.Popen(
            [*self.places.command(CLIENTS), sys.executable, "-c", SILENT, node.host, *ports],
            stdin=subprocess.PIPE,
        )

        def end():
            # It may still be connecting, over a slow network.
            crowd.kill()
            crowd.wait()

        return end

    def slow_network(self):
        name = self.chance.choice(self.everybody)
        self.places.set_wire(name, self.chance.choice([1, 5, 20, 100, 300, 600]), self.chance.choice([0, 0.01, 0.05]))
        return lambda: self.places.set_wire(name)

    def clock(self):
        """The time of day jumps, and is right again later."""
        return self.some().fault("clock %d" % self.chance.randint(-86400, 86400))

    def far_clock(self):
        """The time of day is years ahead."""
        return self.some().fault("clock %d" % (self.chance.randint(1, 12) * 365 * 86400))

    def slow_disk(self):
        seconds = self.chance.choice([0.02, 0.2, 1.5])
        return self.some().fault("sync-delay %s %s" % (seconds, self.chance.choice(["state/log", "/"])))

    def failing_disk(self):
        """A sync fails: the node ends, and is started again when the disk is sound."""
        machine = self.some()
        sound = machine.fault("sync-error " + self.chance.choice(["state/log", "Data.fs"]))

        def end():
            sound()
            self.counts["nodes that ended with an error"] += machine.ensure_running()

        return end

    def full_disk(self):
        machine = self.some()
        path = os.path.join(machine.node.directory, "ballast")
        if os.path.exists(path):
            return lambda: None
        with contextlib.suppress(OSError):
            fill(machine.node.directory, self.chance.choice([0, 1 << 20, 16 << 20]))

        def end():
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

        return end

    def tight_pack(self):
        """Somebody packs where there is hardly room for a second file."""
        machine = self.some()
        path = os.path.join(machine.node.directory, "ballast")
        if os.path.exists(path):
            return lambda: None
        with contextlib.suppress(OSError):
            fill(machine.node.directory, (33 + self.chance.randint(0, 60)) << 20)
        packing = self.start_pack()

        def end():
            os.remove(path)
            # It is asked to pack; whether it is done does not matter.
            packing.kill()
            packing.wait()
            self.counts["packs in trouble"] += 1

        return end

    def switchover(self):
        """An administrator's; it may fail."""
        at, to = (self.chance.choice(self.machines).node for _ in range(2))

        def run():
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                at.ask("switchover", "--to", to.name, timeout=20)
                self.counts["switchovers"] += 1

        threading.Thread(target=run, daemon=True).start()
        return lambda: None


# How often each comes.
KINDS = {
    World.kill: 5,
    World.kill_all: 1,
    World.restart: 2,
    World.vanish: 2,
    World.lose_disk: 1,
    World.put_back: 1,
    World.freeze: 3,
    World.unplug: 2,
    World.isolate: 2,
    World.one_way: 2,
    World.split: 2,
    World.pair: 2,
    World.swallow: 2,
    World.strangers: 1,
    World.slow_network: 3,
    World.clock: 2,
    World.far_clock: 1,
    World.slow_disk: 2,
    World.failing_disk: 2,
    World.full_disk: 2,
    World.tight_pack: 1,
    World.switchover: 3,
}
