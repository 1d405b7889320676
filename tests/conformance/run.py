"""Runs the test suites that ZEO and ZODB publish in their packages, with the Python server
replaced by `standby serve`.

    python tests/conformance/run.py [--server runzeo] [--msgpack] [PATTERN ...]

The suites are those of the installed packages; nothing of them is copied. Where they start a server,
they get this program instead. PATTERNs choose tests by a part of their names. Tests that cannot apply
are listed in `exceptions.txt` with the reason. `--server runzeo` runs the same tests against the
Python server: so the runner proves itself. `--nodes 3` starts a cluster of three nodes in place of each
server; clients get the addresses of all of them. `--switch SECONDS` makes another node primary that often.
"""

import argparse
import contextlib
import doctest
import importlib
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

import cluster as harness  # noqa: E402

# Modules of ZEO.tests whose tests meet a real server; the others test the client or the Python
# server by themselves.
MODULES = [
    "ZEO.tests.testZEO",
    "ZEO.tests.testConnection",
    "ZEO.tests.test_client_side_conflict_resolution",
    "ZEO.tests.test_sync",
]


class StandbyServer:
    """What the suites get when they ask for a server."""

    def __init__(self, config, path, keep):
        self.path, self.keep, self.config = path, keep, config
        self.log = path + ".log"
        self.start()

    def start(self):
        environment = dict(os.environ, STANDBY_LOG=os.environ.get("STANDBY_LOG", "info"))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [harness.STANDBY, "serve", "-C", self.path],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def wait(self, address, timeout=33, greets=True):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
                with socket.socket(family) as sock:
                    sock.connect(address)
                    if not greets or "<ssl>" in self.config:
                        return
                    # It greets when it has opened its files: who stops it before that finds none.
                    sock.settimeout(1)
                    if sock.recv(4):
                        return
            time.sleep(0.01)
        with open(self.log) as log:
            text = log.read()
        self.stop()
        raise RuntimeError("the server does not start: %s\n%s" % (self.config, text))

    def stop(self, stop_timeout=30):
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(stop_timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        self.clean_up()

    def clean_up(self):
        with open(self.log) as log:
            LOGS.append(log.read())
        os.remove(self.path)
        os.remove(self.log)
        if not self.keep:
            # As FileStorage.cleanup() does.
            section = r"<filestorage[^>]*>.*?^\s*path\s+(\S+)"
            for data in re.findall(section, self.config, re.M | re.S):
                for suffix in ("", ".lock", ".old", ".index", ".tmp", ".pack"):
                    with contextlib.suppress(OSError):
                        os.remove(data + suffix)
                shutil.rmtree(data + ".standby", ignore_errors=True)


# What the servers of the present test said.
LOGS = []
# What the nodes of a cluster keep over a restart of its server: by the data file, their ports.
PORTS = {}
# The addresses of all nodes, by that of the first.
CLUSTERS = {}
# When a primary was replaced.
SWITCHED = []
# Tests that lost a connection by that and were run again.
AGAIN = []


class StandbyCluster:
    """Three nodes in place of a server. The first has its files and its address."""

    switching = None

    def __init__(self, config, path, keep, address):
        self.stopping = threading.Event()
        data = re.search(r"<filestorage[^>]*>.*?^\s*path\s+(\S+)", config, re.M | re.S)
        self.data = os.path.abspath(data.group(1))
        # Ports of peers, administrators, and clients.
        ports = PORTS.setdefault(self.data, harness.free_ports(9))
        self.addresses = [address] + [("127.0.0.1", port) for port in ports[6:8]]
        CLUSTERS[address] = self.addresses
        members = "".join("member n%d 127.0.0.1:%d here\n" % (n, ports[n]) for n in range(3))
        self.admin = ports[3:6]
        self.nodes = []
        for n in reversed(range(3)):
            text = config if n == 0 else other_node(config, n, "127.0.0.1:%d" % ports[5 + n])
            text += (
                "\n<standby>\ncluster test\nnode n%d\ngroup here\nstate-dir %s\n"
                "peer-address 127.0.0.1:%d\nadmin-address 127.0.0.1:%d\n%s</standby>\n"
                % (n, self.data + ".standby" + (".%d" % n if n else ""), ports[n], ports[3 + n], members)
            )
            file = "%s.%d" % (path, n)
            with open(file, "w") as out:
                out.write(text)
            self.nodes.append(StandbyServer(text, file, keep))
        os.remove(path)
        self.keep = keep

    def whole(self):
        with contextlib.suppress(OSError):
            url = "http://127.0.0.1:%d/status" % self.admin[0]
            with urllib.request.urlopen(url, timeout=2) as answer:
                nodes = json.load(answer)["nodes"]
            return sum(1 for node in nodes if node["voter"] and node["state"] == "up") == 3

    def wait(self, address, timeout=33):
        try:
            self.nodes[-1].wait(address, timeout, greets=False)
        except RuntimeError:
            self.stop()
            raise
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.whole():
                if OPTIONS.switch:
                    self.switching = threading.Thread(target=self.switch, daemon=True)
                    self.switching.start()
                return
            time.sleep(0.02)
        self.stop()
        raise RuntimeError("the nodes do not come together")

    def switch(self):
        # Not at the same point of a test that is run again.
        while not self.stopping.wait(OPTIONS.switch * random.uniform(0.2, 1.8)):
            request = urllib.request.Request(
                "http://127.0.0.1:%d/ask" % self.admin[0],
                b'{"switchover": {"to": null, "grace": 5}}',
                {"Content-Type": "application/json"},
            )
            # Refused when the test itself has just stopped a node.
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=30).close()
                SWITCHED.append(time.monotonic())

    def stop(self, stop_timeout=30):
        self.stopping.set()
        if self.switching:
            self.switching.join(stop_timeout)
        CLUSTERS.pop(self.addresses[0], None)
        for node in self.nodes:
            if node.process:
                node.process.terminate()
        for node in self.nodes:
            node.stop(stop_timeout)
        if not self.keep:
            for n in range(3):
                state = self.data + ".standby" + (".%d" % n if n else "")
                shutil.rmtree(state, ignore_errors=True)
            PORTS.pop(self.data, None)


def other_node(config, n, address):
    """The configuration of another node: its own files and address."""
    config = re.sub(r"^(\s*address\s+).+$", r"\g<1>" + address, config, flags=re.M)
    config = re.sub(r"^\s*pid-filename\s.*$", "", config, flags=re.M)
    return re.sub(r"^(\s*(?:path|blob-dir)\s+)(\S+)", r"\1\2.n%d" % n, config, flags=re.M)


def give_all_addresses():
    """Clients know all nodes of a cluster, as those of a real one do."""
    import ZEO.asyncio.client

    init = ZEO.asyncio.client.ClientThread.__init__

    def init_with_all(self, addrs, *args, **options):
        found = [all for address in addrs for all in CLUSTERS.get(address, [address])]
        return init(self, found, *args, **options)

    ZEO.asyncio.client.ClientThread.__init__ = init_with_all


def start_standby(
    storage_conf=None,
    zeo_conf=None,
    port=None,
    keep=False,
    path="Data.fs",
    protocol=None,
    blob_dir=None,
    suicide=True,
    debug=False,
    threaded=False,
    start_timeout=33,
    name=None,
    log=None,
    show_config=False,
):
    """The same arguments and results as `ZEO._forker.start_zeo_server`."""
    from ZEO._forker import ZEOConfig

    if "<zeoclient" in (storage_conf or ""):
        # A Python server that is a client of ours.
        arguments = dict(locals(), storage_conf=storage_conf)
        del arguments["ZEOConfig"]
        return START_PYTHON(**arguments)
    storage_conf = storage_conf or "<filestorage>\npath %s\n</filestorage>" % path
    if blob_dir:
        storage_conf = "<blobstorage>\nblob-dir %s\n%s\n</blobstorage>" % (blob_dir, storage_conf)
    if zeo_conf is None or isinstance(zeo_conf, dict):
        address = ("127.0.0.1", port or 0) if port is None or isinstance(port, int) else port
        options = zeo_conf
        zeo_conf = ZEOConfig(address, log=log)
        zeo_conf.__dict__.update(options or {})
    config = "%s\n\n%s" % (zeo_conf, storage_conf)
    if show_config:
        print(config)
    config, address = adapt(config)
    handle, file = tempfile.mkstemp(".conf", prefix="conformance", dir=os.getcwd())
    with os.fdopen(handle, "w") as out:
        out.write(config)
    if OPTIONS.nodes == 3:
        server = StandbyCluster(config, file, keep, address)
    else:
        server = StandbyServer(config, file, keep)
    server.wait(address, start_timeout)
    return address, server.stop


def adapt(config):
    """A configuration for Standby, and the address that clients get."""
    # Port 0 means any; the Python server tells which in its own process.
    found = re.search(r"^\s*address\s+(.+)$", config, re.M)
    target = found.group(1).strip()
    if "/" not in target:
        host, port = target.rsplit(":", 1)
        target = (host, int(port) or harness.free_ports(1)[0])
        config = config[: found.start(1)] + "%s:%d" % target + config[found.end(1) :]
    # Tests that are content with storages in memory get files.
    while True:
        found = re.search(r"<mappingstorage([^/>]*)(?:/>|>.*?</mappingstorage>)", config, re.S)
        if not found:
            break
        data = tempfile.mktemp(".fs", "mapping", os.getcwd())
        section = "<filestorage%s>\npath %s\n</filestorage>" % (found.group(1), data)
        config = config[: found.start()] + section + config[found.end() :]
    # A storage that is slow inside the Python process; the tests are of the races that this provokes.
    config = re.sub(r"^\s*(%import .*|</?loaddelayed_storage>)$", "", config, flags=re.M)
    if OPTIONS.msgpack and "msgpack" not in config:
        config = config.replace("<zeo>", "<zeo>\nmsgpack true", 1)
    return config, target


def flatten(suite, layer=None):
    layer = getattr(suite, "layer", None) or layer
    if isinstance(suite, unittest.TestSuite):
        for inner in suite:
            yield from flatten(inner, layer)
    else:
        yield layer, suite


def name_of(test):
    name = test.id()
    # A test is named by the class that it runs in; a doctest by its file or function.
    return re.sub(r"^.*/ZEO/", "ZEO/", name)


def read_exceptions():
    """Patterns of tests that cannot apply, each with its reason."""
    found = []
    with open(os.path.join(HERE, "exceptions.txt")) as lines:
        for line in lines:
            line = line.split("#")[0].strip()
            if line:
                pattern, reason = line.split(None, 1)
                only, _, rest = pattern.rpartition(":")
                if only:
                    if not {"cluster": OPTIONS.nodes == 3, "switch": OPTIONS.switch}[only]:
                        continue
                    pattern = rest
                found.append((re.compile(pattern), reason))
    return found


class Result(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.passed = 0

    def startTest(self, test):
        super().startTest(test)
        self.began = time.monotonic()
        self.failed = False
        LOGS.clear()

    def stopTest(self, test):
        super().stopTest(test)
        if self.failed or os.environ.get("CONFORMANCE_SHOW"):
            for log in LOGS:
                sys.__stdout__.write("a server of this test said:\n%s\n" % log[-4000:])

    def say(self, word, test):
        self.failed = word != "passed"
        sys.__stdout__.write(
            "%-7s %6.2f s  %s\n" % (word, time.monotonic() - self.began, name_of(test))
        )
        sys.__stdout__.flush()

    def addSuccess(self, test):
        self.passed += 1
        if OPTIONS.verbose:
            self.say("passed", test)

    def addError(self, test, error):
        super().addError(test, error)
        self.say("ERROR", test)

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.say("FAILED", test)


def collect():
    exceptions = read_exceptions()
    chosen, skipped = [], []
    for module in MODULES:
        module = importlib.import_module(module)
        if hasattr(module, "test_suite"):
            suite = module.test_suite()
        else:
            suite = unittest.defaultTestLoader.loadTestsFromModule(module)
        for layer, test in flatten(suite):
            name = name_of(test)
            if OPTIONS.patterns and not any(p in name for p in OPTIONS.patterns):
                continue
            reason = next((reason for p, reason in exceptions if p.search(name)), None)
            if OPTIONS.msgpack and name.endswith("test_runzeo_msgpack_support"):
                reason = "is about a server that announces pickle"
            if reason and OPTIONS.server != "runzeo":
                skipped.append((name, reason))
            else:
                chosen.append((layer, test))
    return chosen, skipped


def disconnected(result, test):
    """True, and forgotten, if a test ended in a lost connection: ZODB's users try again."""
    for found in (result.errors, result.failures):
        if found and found[-1][0] is test and "ClientDisconnected" in found[-1][1].splitlines()[-1]:
            found.pop()
            AGAIN.append(name_of(test))
            return True
    return False


def run(chosen):
    result = Result()
    groups = {}
    for layer, test in chosen:
        groups.setdefault(id(layer), (layer, []))[1].append(test)
    for layer, tests in groups.values():
        if layer is not None and hasattr(layer, "setUp"):
            layer.setUp()
        for test in tests:
            here = os.getcwd()
            for attempts_left in reversed(range(10)):
                test(result)
                # A test that fails early stays where it was.
                os.chdir(here)
                if not OPTIONS.switch or not attempts_left or not disconnected(result, test):
                    break
        if layer is not None and hasattr(layer, "tearDown"):
            layer.tearDown()
    return result


class PortsApart:
    """Stands for the module `random` where the suites draw ports: two runs at the same time must not draw the same
    one between the look at it and its use."""

    @staticmethod
    def randrange(start, stop):
        width = (stop - start) // harness.SHARES
        first = start + harness.SHARE * width
        # The suites also use the next one.
        return random.randrange(first, first + width - 1)


class Formatted(logging.LogRecord):
    """A log record with its `message` before any handler has formatted it: ZEO's client-config.test reads the
    message of what the client happened to log meanwhile, and nothing is formatted here."""

    def __getattr__(self, name):
        if name == "message":
            return self.getMessage()
        raise AttributeError(name)


def main():
    warnings.simplefilter("ignore")
    # Nothing on the screen; tests that look at log lines have handlers of their own.
    logging.getLogger().addHandler(logging.NullHandler())
    logging.setLogRecordFactory(Formatted)
    sys.unraisablehook = lambda unraisable: None
    import ZEO.tests.forker

    ZEO.tests.forker.random = PortsApart
    if OPTIONS.server == "standby":
        import ZEO._forker

        global START_PYTHON
        START_PYTHON = ZEO._forker.start_zeo_server
        ZEO._forker.start_zeo_server = start_standby
        ZEO.tests.forker.start_zeo_server = start_standby
        if OPTIONS.nodes == 3:
            give_all_addresses()
    doctest.set_unittest_reportflags(doctest.REPORT_ONLY_FIRST_FAILURE)
    chosen, skipped = collect()
    if OPTIONS.list:
        for _, test in chosen:
            print(name_of(test))
        return 0
    start = os.getcwd()
    directory = tempfile.mkdtemp(prefix="standby-conformance-")
    os.chdir(directory)
    try:
        result = run(chosen)
    finally:
        os.chdir(start)
        shutil.rmtree(directory, ignore_errors=True)
    failed = result.errors + result.failures
    for test, text in failed:
        print("=" * 70 + "\n%s\n%s" % (name_of(test), text))
    if OPTIONS.verbose:
        for name, reason in skipped:
            print("skipped  %s: %s" % (name, reason))
    for test, _ in failed:
        print("failed   %s" % name_of(test))
    skips = len(skipped) + len(result.skipped)
    if OPTIONS.switch:
        print("\n%d switchovers, %d tests run again" % (len(SWITCHED), len(AGAIN)), end="")
    print("\n%d passed, %d failed, %d skipped" % (result.passed, len(failed), skips))
    return 1 if failed else 0


def without_override():
    """Begins anew as a user whom file permissions hold, for tests that try them: root without the
    capabilities to pass them by."""
    mark = "CONFORMANCE_PERMISSIONS"
    if os.geteuid() != 0 or mark in os.environ or not shutil.which("setpriv"):
        return
    os.environ[mark] = "held"
    caps = "-dac_override,-dac_read_search"
    command = ["setpriv", "--bounding-set", caps, "--inh-caps", caps, sys.executable]
    os.execvp("setpriv", command + sys.argv)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="a part of tests' names")
    parser.add_argument("--server", choices=["standby", "runzeo"], default="standby")
    parser.add_argument("--msgpack", action="store_true", help="servers announce msgpack")
    parser.add_argument("--nodes", type=int, choices=[1, 3], default=1, help="of each server")
    parser.add_argument(
        "--switch", type=float, metavar="SECONDS", help="between two switchovers; for --nodes 3"
    )
    parser.add_argument("--list", action="store_true", help="only list the tests")
    parser.add_argument("-v", "--verbose", action="store_true", help="also what passed or is skipped")
    OPTIONS = parser.parse_args()
    if OPTIONS.switch and OPTIONS.nodes != 3:
        parser.error("--switch needs --nodes 3")
    without_override()
    sys.exit(main())
