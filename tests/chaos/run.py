"""A cluster in trouble, with stock clients that are never told.

    python tests/chaos/run.py [--minutes 5] [--seed N] [--directory DIR]

Four nodes, each with a supervisor on a machine of its own (a network namespace with its cable, a small disk, faults),
three of which vote; client processes that move amounts, count, append, keep blobs and read; and what can go wrong:
processes killed, frozen, restarted; hosts that vanish; links down, partitions of all kinds, one-way ones, slow and
lossy cables, connections that deliver nothing any more; crowds of silent connections; clocks that jump, years ahead too;
full, slow and failing disks, lost ones, and such as are put back to an earlier state; switchovers, packs, also where
there is hardly room, killed clients. After each half minute all is repaired: the
cluster must be whole again, and every client must commit. In the end what clients were told is compared with the
files of all nodes, as Python's FileStorage reads them.

The same seed means the same troubles; what they meet depends on the moment. Needs root, ip and nft. If anything is
wrong, the files stay where they are, and the exit status is 1.
"""

import argparse
import collections
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

import checker  # noqa: E402
import cluster as harness  # noqa: E402
from trouble import CLIENTS, KINDS, OFFICE, World  # noqa: E402

CLIENT = os.path.join(HERE, "client.py")
# Stock clients with the addresses of all nodes, one behind a router, and one with standby_zodb, if that is installed, and
# one address.
WRITERS = ["w1", "w2", "w3", "w4", "q1"] + ["p1"] * (importlib.util.find_spec("standby_zodb") is not None)
READERS = ["r1", "r2"]
# Of writing clients; those that are connected to a replica do not know of the newest commits.
FRESH = WRITERS + ["r1"]
REPAIR = 120
# A node whose disk was lost gets everything from another one, while all commit.
REFILL = 300


class Violation(Exception):
    pass


class Aborted(Exception):
    pass


class Run:
    def __init__(self, options, directory):
        self.options, self.directory = options, directory
        self.chance = random.Random(options.seed)
        self.faults, self.came, self.checked = (collections.Counter() for _ in range(3))
        self.pauses = []
        self.minutes, self.started, self.aborted = options.minutes, time.monotonic(), False
        recovery = self.chance.choice(["normal", "fast", "auto"])
        lines = "  log-tail %s\n  recovery %s\n  reserve 32MB\n" % (self.chance.choice(["64KB", "8MB"]), recovery)
        self.say("seed %d: %s" % (options.seed, " ".join(lines.split())))
        self.world = World(directory, ["here"] * 3 + ["there"], lines, self.chance)
        self.world.start_pack = self.start_pack
        self.cluster = self.world.cluster
        self.clients = {}
        seed = [self.cluster.nodes[0].address]
        within = self.world.places.command(CLIENTS)
        self.router = harness.Router(os.path.join(directory, "router"), seed, within=within)
        self.world_file = os.path.join(directory, "world.json")
        with open(self.world_file, "w") as file:
            json.dump(
                dict(
                    addresses=self.cluster.addresses,
                    directory=directory,
                    seed=options.seed,
                    writers=WRITERS,
                    persistent=["w1", "w2", "r2"],
                    router=self.router.writes,
                    replicas={"r2": [self.cluster.nodes[-1].read_only_address]},
                    pause=0.03,
                ),
                file,
            )

    def say(self, text):
        print(text, flush=True)

    # Clients.

    def spawn(self, name):
        with open(os.path.join(self.directory, name + ".err"), "ab") as errors:
            self.clients[name] = subprocess.Popen(
                [*self.world.places.command(CLIENTS), sys.executable, CLIENT, name, self.world_file],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )

    def kill_client(self):
        name = self.chance.choice(WRITERS + READERS)
        self.clients[name].kill()
        self.clients[name].wait()
        self.spawn(name)

    def start_pack(self):
        command = [*self.world.places.command(CLIENTS), sys.executable, CLIENT, "pack", self.world_file]
        with open(os.path.join(self.directory, "pack.err"), "ab") as errors:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)

    def pack(self):
        """As an administrator does, who tries again."""
        self.came["packs"] += 1

        def packed():
            packing = self.start_pack()
            try:
                return packing.wait(REPAIR) == 0
            except subprocess.TimeoutExpired:
                packing.kill()
                packing.wait()
                raise

        try:
            harness.wait_for("a pack", packed, REPAIR, poll=1)
        except (AssertionError, subprocess.TimeoutExpired):
            raise Violation("no pack within %d s while nothing was wrong: see pack.err" % REPAIR)

    def log_path(self, name):
        return os.path.join(self.directory, name + ".log")

    def sizes(self):
        paths = {name: self.log_path(name) for name in self.clients}
        return {name: os.path.getsize(path) if os.path.exists(path) else 0 for name, path in paths.items()}

    def check_alive(self, name):
        if self.aborted:
            raise Aborted("interrupted")
        if self.clients[name].poll() is not None:
            raise Violation("client %s has ended: see %s.err" % (name, name))

    # Rounds.

    def begin(self):
        self.cluster.start()
        self.router.start()
        subprocess.run(
            [*self.world.places.command(CLIENTS), sys.executable, CLIENT, "found", self.world_file], check=True
        )
        for name in WRITERS + READERS:
            self.spawn(name)
        self.wait_for_clients()

    def trouble(self, seconds):
        """So long, things go wrong."""
        started = time.monotonic()
        kinds = self.chance.choices(list(KINDS), list(KINDS.values()), k=self.chance.randint(2, 6))
        events = []
        for number, kind in enumerate(kinds):
            at = self.chance.random() * seconds * 0.8
            lasts = self.chance.choice([0.2, 1, 3, 6, 10]) * (0.5 + self.chance.random())
            events.append((at, number, kind, lasts))
        if self.chance.random() < 0.3:
            events.append((self.chance.random() * seconds * 0.8, len(kinds), None, 0))
        events.sort(key=lambda event: event[:2])
        names = [kind.__name__ if kind else "kill_client" for _, _, kind, _ in events]
        self.say("%7.1f  %s" % (time.monotonic() - self.started, " ".join(names)))
        ends = []
        while events or ends:
            if self.aborted:
                raise Aborted("interrupted")
            now = time.monotonic() - started
            if events and events[0][0] <= now:
                _, number, kind, lasts = events.pop(0)
                if kind is None:
                    self.faults["kill_client"] += 1
                    self.kill_client()
                    continue
                self.faults[kind.__name__] += 1
                ends.append((now + lasts, number, kind(self.world)))
                ends.sort(key=lambda end: end[:2])
            elif ends and ends[0][0] <= now:
                ends.pop(0)[2]()
            else:
                time.sleep(0.02)

    def calm(self):
        """All is repaired: how long until the cluster is whole, and every client has committed."""
        repaired = time.monotonic()
        limit = REFILL if self.world.lost_disk else REPAIR
        for machine in self.world.machines:
            machine.ensure_running()
        try:
            self.cluster.wait_healthy(limit)
        except AssertionError as error:
            raise Violation("the cluster is not whole %d s after all was repaired: %s" % (limit, str(error)[:3000]))
        self.world.lost_disk = False
        whole = time.monotonic() - repaired
        self.wait_for_clients()
        self.pauses.append((whole, time.monotonic() - repaired))
        self.came["rounds"] += 1

    def wait_for_clients(self):
        """Each has done something that began now, and writers have committed."""
        began = time.monotonic()
        sizes = self.sizes()
        for name in self.clients:
            writes = name in WRITERS

            def done():
                self.check_alive(name)
                return has_succeeded(self.log_path(name), sizes[name], began, writes)

            try:
                harness.wait_for("client %s" % name, done, REPAIR, poll=0.1)
            except AssertionError:
                self.restart_if_lost(name)
                harness.wait_for("client %s, started again" % name, done, REPAIR, poll=0.1)

    def restart_if_lost(self, name):
        """A stock client that waits to be greeted says nothing, and waits for ever over a connection of which no machine
        but its own knows: the other one was killed, and what its kernel said of that was lost. Nothing else may hold a
        client up."""
        half_open = self.world.half_open(self.clients[name].pid)
        if not half_open:
            raise Violation("client %s does nothing %d s after all was repaired" % (name, REPAIR))
        self.say("         client %s waits over %s, which nobody else knows" % (name, ", ".join(half_open)))
        self.came["clients with a connection that nobody else knows"] += 1
        self.clients[name].kill()
        self.clients[name].wait()
        self.spawn(name)

    def interrupt(self, *_):
        """The first time, this round is the last one; the second time, it ends at its next step."""
        self.aborted = self.minutes == 0
        self.minutes = 0

    def run(self):
        self.begin()
        while time.monotonic() < self.started + self.minutes * 60:
            self.trouble(self.chance.uniform(10, 30))
            self.calm()
            if self.came["rounds"] % 4 == 0:
                self.pack()
        self.finish()

    def finish(self):
        for client in self.clients.values():
            client.terminate()
        for name, client in self.clients.items():
            if client.wait(60) != 0:
                raise Violation("client %s ended with %s: see %s.err" % (name, client.returncode, name))
        if self.router.stop() != 0:
            raise Violation("the router has not ended in order: see router/log.txt")
        try:
            self.cluster.wait_level(REPAIR)
        except AssertionError as error:
            raise Violation("the nodes do not come to the same: %s" % str(error)[:3000])
        logs = [node.log() for node in self.cluster.nodes]
        self.came["times that a node became primary"] = sum(log.count("this node is primary") for log in logs)
        self.came["frozen nodes killed by their supervisors"] = sum(
            log.count("gave no sign of life") for log in logs
        )
        self.cluster.stop()
        clients = []
        for name in WRITERS + READERS:
            log = checker.Log(name, self.log_path(name))
            log.fresh = name in FRESH
            clients.append(log)
        wrong = checker.check_all(self.cluster, clients, self.checked)
        if wrong:
            raise Violation("\n".join(wrong[:50]))

    def report(self):
        minutes = (time.monotonic() - self.started) / 60
        self.say("\nseed %d, %.1f minutes" % (self.options.seed, minutes))
        for title, counts in (
            ("what went wrong", self.faults),
            ("what came of it", self.came + self.world.counts),
            ("what was checked", self.checked),
        ):
            self.say("\n%s" % title)
            for name, number in sorted(counts.items()):
                self.say("  %-45s %8d" % (name, number))
        self.say("\nafter all was repaired, in the middle and at worst")
        for number, what in enumerate(("the cluster was whole", "every client had committed")):
            times = sorted(pause[number] for pause in self.pauses)
            if times:
                self.say("  %-45s %6.1f s %6.1f s" % (what, times[len(times) // 2], times[-1]))

    def close(self, keep):
        for client in self.clients.values():
            if client.poll() is None:
                client.kill()
                client.wait()
        self.router.kill()
        self.world.close(keep)


def has_succeeded(path, offset, began, writes):
    """Whether the log has, after an offset, something that began after a moment and went well."""
    if not os.path.exists(path):
        return False
    begun = {}
    with open(path, "rb") as log:
        log.seek(offset)
        for line in log:
            if not line.endswith(b"\n"):
                break
            try:
                line = json.loads(line)
            except ValueError:
                # The offset was within a line.
                continue
            if line.get("begin", 0) >= began and (not writes or line["kind"] not in checker.READS):
                begun[line["try"]] = True
            elif line.get("seq") in begun and line.get("outcome") == "ok":
                return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="how long things go wrong (5)")
    parser.add_argument("--seed", type=int, help="which troubles (by chance)")
    parser.add_argument("--directory", help="where all files go, and stay (a temporary one)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces and file systems of its own need root")
    for tool, package in (("ip", "iproute2"), ("nft", "nftables"), ("cc", "gcc")):
        if not shutil.which(tool):
            parser.error("%s is not here: apt install %s" % (tool, package))
    if not os.path.exists(harness.STANDBY):
        parser.error("%s is not here: cargo build --release" % harness.STANDBY)
    if options.seed is None:
        options.seed = random.randrange(1 << 32)
    directory = os.path.abspath(options.directory or tempfile.mkdtemp(prefix="chaos"))
    os.makedirs(directory, exist_ok=True)
    run = Run(options, directory)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.interrupt)
    failed = True
    try:
        run.world.places.run(OFFICE, run.run)
        failed = False
        run.report()
        run.say("\nno violation")
    except (Violation, AssertionError) as violation:
        run.report()
        run.say("\nVIOLATION, seed %d: %s\nfiles: %s" % (options.seed, violation, directory))
    except Aborted:
        run.say("\ninterrupted; files: %s" % directory)
    finally:
        run.close(keep=failed)
    if not failed and not options.directory:
        shutil.rmtree(directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
