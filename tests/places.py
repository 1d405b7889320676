"""Places with machines in them: network namespaces that hang on one switch, some by a long cable.

Needs root. Everything is removed by close().
"""

import ctypes
import os
import subprocess
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
WIRE = [sys.executable, os.path.join(HERE, "wire.py")]
CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


def moving(address, before=""):
    """Options of nodes in places that have an address go with the primary; `before` is a command that runs before the
    address leaves."""
    announce = '"%s" -I -S "%s" %s' % (sys.executable, os.path.join(HERE, "announce.py"), address)
    return (
        "  on-primary ip addr add %s/32 dev eth0; %s\n" % (address, announce)
        + "  on-replica %sip addr del %s/32 dev eth0 || true\n" % (before, address)
    )


def ip(*words):
    subprocess.run(["ip", *words], check=True, stdin=subprocess.DEVNULL)


def call(name, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


class Places:
    """`names` are places; `delays` says how many milliseconds away some are, each way. What is there can be
    changed later."""

    def __init__(self, names, delays=None):
        self.prefix = "sb%d" % os.getpid()
        self.spaces, self.wires, self.hosts = [], {}, {}
        try:
            self.switch = self.space("switch")
            ip("-n", self.switch, "link", "add", "switch", "type", "bridge")
            ip("-n", self.switch, "link", "set", "switch", "up")
            for number, name in enumerate(names, 1):
                self.add(number, name, (delays or {}).get(name))
        except BaseException:
            self.close()
            raise

    def space(self, name):
        space = "%s-%s" % (self.prefix, name)
        ip("netns", "add", space)
        self.spaces.append(space)
        ip("-n", space, "link", "set", "lo", "up")
        return space

    def add(self, number, name, delay):
        space, port = self.space(name), "port%d" % number
        self.hosts[name] = host = "10.77.0.%d" % number
        if delay is None:
            self.cable(space, "eth0", self.switch, port)
        else:
            between = self.space("wire%d" % number)
            self.cable(space, "eth0", between, "near")
            self.cable(between, "far", self.switch, port)
            for where, interface in ((space, "eth0"), (self.switch, port)):
                subprocess.run(self.within(where) + WIRE + ["--whole", interface], check=True)
            self.wires[name] = subprocess.Popen(
                self.within(between) + WIRE + ["near", "far", str(delay)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert self.wires[name].stdout.readline() == b"ready\n"
        ip("-n", self.switch, "link", "set", port, "master", "switch")
        ip("-n", space, "addr", "add", host + "/24", "dev", "eth0")

    def cable(self, space, name, other, other_name):
        ip("-n", space, "link", "add", name, "type", "veth", "peer", "name", other_name, "netns", other)
        ip("-n", space, "link", "set", name, "up")
        ip("-n", other, "link", "set", other_name, "up")

    def within(self, space):
        return ["ip", "netns", "exec", space]

    def command(self, name):
        """What stands before a command that is to run in a place."""
        return self.within("%s-%s" % (self.prefix, name))

    def cut(self, name):
        """Nothing comes or goes; no connection is closed."""
        self.set_port(name, "down")

    def heal(self, name):
        self.set_port(name, "up")

    def deafen(self, name, *others):
        """What `others` send to a place is lost; what it sends reaches them."""
        for other in others:
            self.route("add", other, name)

    def undeafen(self, name, *others):
        for other in others:
            self.route("del", other, name)

    def swallow(self, name, ports):
        """The connections of a place that are open now, from or to ports that begin so, deliver nothing any more; new
        ones work. Returns how many there are."""
        within = self.command(name)
        listed = subprocess.run(
            within + ["ss", "-Htn", "state", "established"], check=True, capture_output=True, text=True
        )
        rules = ["add table inet hole", "flush table inet hole"]
        for chain in ("input", "output"):
            rules.append("add chain inet hole %s { type filter hook %s priority 0; }" % (chain, chain))
        count = 0
        for line in listed.stdout.splitlines():
            here, there = (end.rsplit(":", 1) for end in line.split()[2:4])
            if here[0].startswith("10.77.") and any(end[1].startswith(ports) for end in (here, there)):
                count += 1
                rules.append("add rule inet hole input tcp dport %s tcp sport %s drop" % (here[1], there[1]))
                rules.append("add rule inet hole output tcp sport %s tcp dport %s drop" % (here[1], there[1]))
        subprocess.run(within + ["nft", "-f", "-"], check=True, input="\n".join(rules), text=True)
        return count

    def unswallow(self, name):
        rules = "add table inet hole\ndelete table inet hole\n"
        subprocess.run(self.command(name) + ["nft", "-f", "-"], check=True, input=rules, text=True)

    def set_wire(self, name, delay=0, lost=0):
        """From now on the cable of a place has another delay, and loses a part of the frames."""
        wire = self.wires[name]
        wire.stdin.write(b"%f %f\n" % (delay, lost))
        wire.stdin.flush()

    def route(self, verb, place, target):
        space = "%s-%s" % (self.prefix, place)
        ip("-n", space, "route", verb, "blackhole", self.hosts[target])

    def set_port(self, name, state):
        port = "port%s" % self.hosts[name].rsplit(".", 1)[1]
        ip("-n", self.switch, "link", "set", port, state)

    def run(self, name, test, hosts=None):
        """Runs test() in a place: its sockets, and those of threads that it starts, are there. `hosts` is a file that they
        see as /etc/hosts."""
        ended = []

        def enter():
            with open("/run/netns/%s-%s" % (self.prefix, name)) as space:
                call("setns", space.fileno(), CLONE_NEWNET)
            if hosts is not None:
                call("unshare", CLONE_NEWNS)
                call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
                call("mount", os.fsencode(hosts), b"/etc/hosts", None, MS_BIND, None)
            test()

        def body():
            try:
                enter()
                ended.append(None)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if ended[0] is not None:
            raise ended[0]

    def close(self):
        for wire in self.wires.values():
            wire.stdin.close()
            wire.wait()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)
