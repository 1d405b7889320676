"""A real application on a cluster in trouble: Zope in four processes, with a product of its own, and browsers.

    python tests/zope/run.py [--ways stock router standby] [--zope DIRECTORY/bin] [--keep DIRECTORY]

For each way to configure Zope (a stock <zeoclient> with the addresses of all nodes; the same with that of `standby router`;
<standbyclient> with the address of one node) a new cluster of three nodes, each on a machine of its own (a network
namespace), each under `--supervise`. While browsers write pages, search the catalog, attach files and count visits: the
primary is killed, switched over, frozen, cut off, and a node is added. No request may fail; what was answered must be
there afterwards. Printed for each trouble: requests, those that failed, the slowest.

Needs root, and a Python with Zope, ZEO and standby_zodb: `--zope` is its directory of programs (.venv-zope/bin).
"""

import argparse
import collections
import http.client
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import cluster as harness  # noqa: E402
from places import Places  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(HERE))
PROCESSES = 4
BROWSERS = 8
# A stock client waits for a server for half a minute; a request may meet that twice.
PATIENCE = 90
# Seconds of work before and after each trouble.
WORK = 3

CONFIGURATION = """\
%(imports)s
%%define INSTANCE %(directory)s
instancehome $INSTANCE
<zodb_db main>
  mount-point /
  cache-size 5000
  <%(section)s>
%(servers)s    blob-dir $INSTANCE/blobs
  </%(section)s>
</zodb_db>
"""
SERVER = """\
[app:zope]
use = egg:Zope#main
zope_conf = %(directory)s/etc/zope.conf
[server:main]
use = egg:waitress#main
host = 127.0.0.1
port = %(port)d
threads = 4
[pipeline:main]
pipeline = egg:Zope#httpexceptions zope
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = line
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = line
[formatter_line]
format = %%(asctime)s %%(levelname)s %%(name)s %%(message)s
"""
# Makes the application's object, as an administrator does.
SETUP = """\
import sys, transaction
from Zope2.Startup.run import configure_wsgi
configure_wsgi(sys.argv[1])
import Zope2
from archive import Archive
app = Zope2.app()
app._setObject('archive', Archive('archive'))
transaction.commit()
"""


class Zope(harness.Process):
    """One process of the site."""

    def __init__(self, directory, programs, way, servers, within):
        super().__init__(directory)
        self.programs, self.within = programs, within
        (self.port,) = harness.free_ports(1)
        os.makedirs(os.path.join(self.directory, "etc"))
        os.makedirs(os.path.join(self.directory, "var"))
        section = "standbyclient" if way == "standby" else "zeoclient"
        words = dict(
            directory=self.directory,
            port=self.port,
            section=section,
            imports="%import standby_zodb" if way == "standby" else "",
            servers="".join("    server %s:%s\n" % server for server in servers),
        )
        for name, text in (("zope.conf", CONFIGURATION), ("zope.ini", SERVER)):
            with open(os.path.join(self.directory, "etc", name), "w") as file:
                file.write(text % words)
        with open(os.path.join(self.directory, "etc", "site.zcml"), "w") as file:
            file.write('<configure xmlns="http://namespaces.zope.org/zope"><include package="Products.Five"/></configure>')

    def etc(self, name):
        return os.path.join(self.directory, "etc", name)

    def env(self, *command):
        return [*self.within, "env", "PYTHONPATH=" + HERE, *command]

    def set_up(self):
        python = os.path.join(self.programs, "python")
        subprocess.run(self.env(python, "-c", SETUP, self.etc("zope.conf")), check=True, timeout=120)

    def command(self):
        return self.env(os.path.join(self.programs, "runwsgi"), self.etc("zope.ini"))

    def get(self, method, timeout=PATIENCE, **form):
        """The status and the text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", "/archive/%s?%s" % (method, urllib.parse.urlencode(form)))
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def answers(self):
        try:
            return self.get("count", timeout=5)[0] == 200
        except OSError:
            return False


class Browser(threading.Thread):
    """A visitor: each of its requests goes to another process of the site, as behind a balancer."""

    def __init__(self, name, site):
        super().__init__(name=name, daemon=True)
        self.site, self.stopping = site, threading.Event()
        self.chance = random.Random(name)
        self.numbers = itertools.count()
        self.written, self.attached, self.visits = {}, {}, 0
        # (begin, seconds, what, failure or None)
        self.requests = []

    def ask(self, method, **form):
        begun, failure, text = time.monotonic(), None, ""
        try:
            status, text = self.chance.choice(self.site).get(method, **form)
            if status != 200:
                failure = "%d: %s" % (status, " ".join(text.split())[:300])
        except OSError as error:
            failure = "%s: %s" % (type(error).__name__, error)
        self.requests.append((begun, time.monotonic() - begun, method, failure))
        return None if failure else text

    def run(self):
        while not self.stopping.is_set():
            number = next(self.numbers)
            title, text = "%s-%d" % (self.name, number), "text %d of %s " % (number, self.name) * 20
            kind = self.chance.choice(["write", "write", "find", "attach", "visit", "visit", "read"])
            if kind == "write" and self.ask("write", title=title, author=self.name, body=text):
                self.written[title] = text
            elif kind == "attach" and self.ask("attach", name=title, text=text):
                self.attached[title] = text
            # Two browsers have one session.
            elif kind == "visit" and self.ask("visit", session=int(self.name) // 2, number=title):
                self.visits += 1
            elif kind == "find":
                self.ask("find", author=self.name)
            elif kind == "read" and self.written:
                title = self.chance.choice(list(self.written))
                text = self.ask("read", title=title)
                # Another process may not have heard of it yet: stock clients without server-sync read a state that was.
                assert text in (None, "", self.written[title]), (title, text)
            time.sleep(self.chance.random() * 0.1)


class Site:
    def __init__(self, way, programs, directory):
        self.way, self.programs, self.directory = way, programs, directory
        self.failed = []
        self.world = Places(["office", "n1", "n2", "n3", "n4"])
        self.cluster = harness.Cluster(
            os.path.join(directory, "cluster"), places=self.world, blobs=True, arguments=["--supervise"]
        )
        self.router, self.site, self.browsers = None, [], []

    def start(self):
        # As README.md says of the machines of stock clients.
        setting = ["sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2"]
        subprocess.run([*self.world.command("office"), *setting], check=True)
        self.cluster.start()
        servers = {"stock": self.cluster.addresses, "standby": self.cluster.addresses[:1]}.get(self.way)
        within = self.world.command("office")
        if servers is None:
            path = os.path.join(self.directory, "router")
            self.router = harness.Router(path, self.cluster.addresses[:1], within=within).start()
            servers = [self.router.writes]
        for number in range(PROCESSES):
            path = os.path.join(self.directory, "zope%d" % number)
            self.site.append(Zope(path, self.programs, self.way, servers, within))
        self.site[0].set_up()
        for zope in self.site:
            zope.start()
        for zope in self.site:
            harness.wait_for("an answer of Zope: see %s" % zope.log_path, zope.answers, 120, poll=0.5)
        self.browsers = [Browser(str(number), self.site) for number in range(BROWSERS)]
        for browser in self.browsers:
            browser.start()

    def close(self):
        for process in [*self.site, *self.cluster.nodes, self.router]:
            if process is not None and process.process is not None:
                process.signal(signal.SIGCONT)
                process.kill()
        self.world.close()

    def trouble(self, name, begin, end=lambda: None, lasts=0):
        """Work, trouble, and work again until the cluster is whole; prints what browsers saw."""
        time.sleep(WORK)
        started = time.monotonic()
        begin()
        time.sleep(lasts)
        end()
        self.cluster.wait_healthy()
        time.sleep(WORK)
        # Those that are under way are part of it.
        ended = time.monotonic()
        harness.wait_for("answers", lambda: all(self.last(browser) > ended for browser in self.browsers), PATIENCE)
        seen = [each for b in self.browsers for each in list(b.requests) if each[0] + each[1] >= started]
        failed = [each for each in seen if each[3]]
        slowest = max(seen, key=lambda each: each[1])
        print(
            "%-10s %-14s %5d requests, %d failed, slowest %6.2f s (%s)"
            % (self.way, name, len(seen), len(failed), slowest[1], slowest[2]),
            flush=True,
        )
        for _, _, method, failure in failed[:3]:
            print("           %s: %s" % (method, failure), flush=True)
        self.failed += failed

    @staticmethod
    def last(browser):
        """When its last request has begun."""
        return browser.requests[-1][0] if browser.requests else 0

    def serving(self, verb):
        """Does something to the process of the primary, not to its supervisor."""
        os.kill(self.cluster.primary().child(), verb)

    def add_node(self):
        printed = self.cluster.primary().ask("node", "add", "n4")
        options = self.cluster.place(self.world, "here", 4)
        path = os.path.join(self.directory, "cluster", "n4")
        options.update(blobs=True, arguments=["--supervise"])
        self.cluster.invited(path, "n4", printed, group="here", **options).start()

    def run(self):
        self.start()
        cluster, cut = self.cluster, []

        def cut_off():
            cut.append(cluster.primary().name)
            self.world.cut(cut[0])

        self.trouble("nothing", lambda: None)
        self.trouble("killed", lambda: self.serving(signal.SIGKILL))
        self.trouble("switched over", lambda: cluster.primary().ask("switchover"))
        self.trouble("frozen", lambda: self.serving(signal.SIGSTOP), lasts=5)
        self.trouble("cut off", cut_off, lambda: self.world.heal(cut[0]), lasts=25)
        self.trouble("node added", self.add_node)
        self.trouble("killed again", lambda: self.serving(signal.SIGKILL))
        for browser in self.browsers:
            browser.stopping.set()
        for browser in self.browsers:
            browser.join(PATIENCE)
        self.check()

    def check(self):
        """What was answered is there, in every process of the site."""
        counts = collections.Counter()
        for zope in self.site:
            # Each answers a few requests until it has heard of all.
            for browser in self.browsers:
                for title, text in random.sample(sorted(browser.written.items()), min(20, len(browser.written))):
                    harness.wait_for(title, lambda: zope.get("read", title=title) == (200, text))
                for name, text in random.sample(sorted(browser.attached.items()), min(10, len(browser.attached))):
                    harness.wait_for(name, lambda: zope.get("fetch", name=name) == (200, text))
                found = int(zope.get("find", author=browser.name)[1])
                assert found >= len(browser.written), (browser.name, found, len(browser.written))
            pages, cataloged = map(int, zope.get("count")[1].split())
            assert pages == cataloged, (pages, cataloged)
        for browser in self.browsers:
            counts.update(pages=len(browser.written), files=len(browser.attached), visits=browser.visits)
        answered = ", ".join("%d %s" % (count, what) for what, count in counts.items())
        print("%-10s what was answered is there: %s" % (self.way, answered), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=["stock", "router", "standby"], default=["stock", "router", "standby"])
    parser.add_argument("--zope", default=os.path.join(ROOT, ".venv-zope", "bin"), help="the programs of that Python")
    parser.add_argument("--keep", help="where all files go, and stay (a temporary directory)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root")
    failed = False
    for way in options.ways:
        directory = os.path.join(options.keep, way) if options.keep else tempfile.mkdtemp(prefix="zope")
        site = Site(way, os.path.abspath(options.zope), directory)
        try:
            site.world.run("office", site.run)
            failed |= bool(site.failed)
        finally:
            site.close()
            if not options.keep:
                shutil.rmtree(directory, ignore_errors=True)
    sys.exit("requests failed" if failed else 0)


if __name__ == "__main__":
    main()
