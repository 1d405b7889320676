"""How clients reach a node: Unix sockets, TLS, signals."""

import contextlib
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
import transaction
from ZEO.Exceptions import ClientDisconnected
from ZODB.utils import z64

import cluster as harness
from test_alone import receive, registered
from zeo_client import Client, open_storage


def certificate(directory, name, issuer=None, authority=True, days=2):
    """Makes a key and a certificate, self-signed or issued; returns both paths. An issued one is no authority."""
    key, cert, request, extensions = (str(directory / (name + end)) for end in (".key", ".pem", ".request", ".ext"))
    with open(extensions, "w") as file:
        file.write("basicConstraints=critical,CA:%s\n" % ("TRUE" if authority and not issuer else "FALSE"))
    command = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request]
    subprocess.run(command + ["-subj", "/CN=" + name], check=True, capture_output=True)
    signed = ["-CA", issuer[1], "-CAkey", issuer[0], "-CAcreateserial"] if issuer else ["-signkey", key]
    command = ["openssl", "x509", "-req", "-in", request, "-days", str(days), "-extfile", extensions, "-out", cert]
    subprocess.run(command + signed, check=True, capture_output=True)
    return key, cert


def client_context(server_cert, key, cert):
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=server_cert)
    context.load_cert_chain(cert, key)
    context.check_hostname = False
    return context


class Tls:
    """Certificates of a server, of an authority, of clients that it knows and does not know."""

    def __init__(self, directory):
        self.server = certificate(directory, "server")
        self.authority = certificate(directory, "authority")
        self.issued = certificate(directory, "issued", self.authority)
        self.known = certificate(directory, "known")
        self.stranger = certificate(directory, "stranger")
        self.folder = directory / "clients"
        self.folder.mkdir()
        shutil.copy(self.authority[1], self.folder)
        shutil.copy(self.known[1], self.folder)

    def section(self, authenticate):
        return "  <ssl>\n    certificate %s\n    key %s\n    authenticate %s\n  </ssl>" % (
            self.server[1],
            self.server[0],
            authenticate,
        )

    def client(self, who):
        return client_context(self.server[1], *who)


@pytest.fixture
def tls(tmp_path):
    return Tls(tmp_path)


def python_takes(server, trusted, client):
    """Whether Python's ssl, as ZEO's server uses it, lets a client in."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=trusted)
    context.load_cert_chain(server[1], server[0])
    context.verify_mode = ssl.CERT_REQUIRED
    ours, theirs = socket.socketpair()

    def connect():
        with contextlib.suppress(OSError):
            with client_context(server[1], *client).wrap_socket(theirs) as sock:
                sock.recv(1)

    connecting = threading.Thread(target=connect)
    connecting.start()
    try:
        with context.wrap_socket(ours, server_side=True) as sock:
            sock.sendall(b"x")
            return True
    except ssl.SSLError:
        return False
    finally:
        ours.close()
        connecting.join(10)


@pytest.mark.parametrize(
    "kind, taken",
    [
        ("known", True),
        ("known, no authority", True),
        ("known, expired", False),
        ("issued by an authority", True),
        ("issued, expired", False),
        ("issued by an authority that has expired", False),
        ("issued by one that is no authority", False),
    ],
)
def test_certificates_are_taken_as_python_takes_them(nodes, tmp_path, kind, taken):
    make = lambda name, **options: certificate(tmp_path, name, **options)
    server = make("server")
    if kind.startswith("known"):
        client = listed = make("client", authority=kind == "known", days=-1 if "expired" in kind else 2)
    else:
        listed = make(
            "listed", authority="no authority" not in kind, days=-1 if kind.endswith("has expired") else 2
        )
        client = make("client", issuer=listed, days=-1 if kind == "issued, expired" else 2)
    assert python_takes(server, listed[1], client) == taken
    section = "  <ssl>\n    certificate %s\n    key %s\n    authenticate %s\n  </ssl>"
    node = nodes.alone(zeo=section % (server[1], server[0], listed[1])).start()
    context = client_context(server[1], *client)
    if taken:
        Client(node.address, ssl=context).close()
    else:
        refused(node.address, ssl=context)
    assert ("of no use" in node.log()) == ("expired" in kind and kind != "issued, expired")
    assert "valid for so many days only" in node.log(), "the server's own"


def refused(address, **options):
    with pytest.raises(ClientDisconnected):
        open_storage(address, wait_timeout=2, **options)


def test_tls_asks_every_client_for_a_certificate(nodes, tls):
    node = nodes.alone(zeo=tls.section(tls.folder)).start()
    for who in (tls.issued, tls.known):
        client = Client(node.address, ssl=tls.client(who))
        client.commit(lambda root: root.update(x=who[0]))
        client.close()
    refused(node.address, ssl=tls.client(tls.stranger))
    refused(node.address)
    assert "no TLS with a client" in node.log()


def test_certificates_are_read_again(nodes, tls):
    node = nodes.alone(zeo=tls.section(tls.folder)).start()
    before = Client(node.address, ssl=tls.client(tls.known))
    before.commit(lambda root: root.update(x=1))
    refused(node.address, ssl=tls.client(tls.stranger))
    shutil.copy(tls.stranger[1], tls.folder)
    node.signal(signal.SIGHUP)
    harness.wait_for("the reload", lambda: "certificates were read again" in node.log())
    Client(node.address, ssl=tls.client(tls.stranger)).close()
    with open(tls.server[1], "w") as cert:
        cert.write("nonsense")
    node.signal(signal.SIGHUP)
    harness.wait_for("a complaint", lambda: "former certificates stay in use" in node.log())
    before.commit(lambda root: root.update(x=2))
    before.close()


def test_tls_through_a_failover(nodes, tls):
    """A held client begins TLS when it is served; one that is passed on, with the primary."""
    cluster = nodes.cluster(zeo=tls.section(tls.known[1])).start()
    replica = next(node for node in cluster.nodes if node is not cluster.primary())
    everywhere = Client(cluster.addresses, ssl=tls.client(tls.known))
    passed_on = Client(replica.address, ssl=tls.client(tls.known))
    passed_on.commit(lambda root: root.update(x=1))
    cluster.primary().kill()
    everywhere.commit(lambda root: root.update(x=2))
    passed_on.commit(lambda root: root.update(x=3))
    everywhere.close()
    passed_on.close()


def test_mistakes_in_ssl_are_explained(nodes, tls, tmp_path):
    def complaint(section):
        node = nodes.alone("bad%d" % len(os.listdir(tmp_path)), zeo=section).start()
        assert node.wait() == 1
        return node.log()

    section = tls.section(tls.folder)
    assert "cannot read a private key" in complaint(section.replace(tls.server[0], tls.server[1]))
    assert "do not fit" in complaint(section.replace(tls.server[0], tls.known[0]))
    assert "cannot read certificates" in complaint(section.replace(str(tls.folder), "/nowhere"))
    option = "password-function ab\n  </ssl>"
    assert "is not the dotted name of a Python function" in complaint(section.replace("</ssl>", option))


def listen_at(node, path):
    """The node listens at a Unix socket."""
    with open(node.config_path) as config:
        text = config.read()
    with open(node.config_path, "w") as config:
        config.write(text.replace("%s:%s" % node.address, path))


def test_unix_sockets(nodes, tmp_path):
    path = str(tmp_path / "zeo.sock")
    node = nodes.alone()
    listen_at(node, path)
    node.start()
    client = Client(path)
    client.commit(lambda root: root.update(x=1))
    # The file of a killed server is in the way of nobody; that of a live one is not taken.
    node.kill()
    assert os.path.exists(path)
    node.start()
    client.commit(lambda root: root.update(x=2))
    client.close()
    second = nodes.alone("second")
    shutil.copy(node.config_path, second.config_path)
    second.start()
    assert second.wait() == 1
    assert "cannot listen on address %s" % path in second.log()
    assert node.stop() == 0
    assert not os.path.exists(path)


def test_log_files_are_opened_again(nodes, tmp_path):
    log = tmp_path / "server.log"
    node = nodes.alone()
    with open(node.config_path, "a") as config:
        config.write("<eventlog>\n  <logfile>\n    path %s\n  </logfile>\n</eventlog>\n" % log)
    node.start()
    harness.wait_for("a log", lambda: log.exists() and "listening" in log.read_text())
    os.rename(log, tmp_path / "server.log.1")
    node.signal(signal.SIGUSR2)

    def said():
        Client(node.address).close()
        node.signal(signal.SIGUSR2)
        return log.exists()

    harness.wait_for("a new log", said)
    assert node.stop() == 0
    assert "stopped" in log.read_text()


def test_log_files_look_as_the_configuration_says(nodes, tmp_path):
    node = nodes.alone()
    with open(node.config_path, "a") as config:
        config.write(
            "<eventlog>\n  level debug\n"
            "  <logfile>\n    path %(d)s/all.log\n    dateformat %%d.%%m.%%Y\n"
            "    format ------\\n%%(asctime)s|%%(levelname)-8s|%%(name)s|%%(process)d|%%(message)s\n  </logfile>\n"
            "  <logfile>\n    path %(d)s/errors.log\n    level error\n    delay true\n  </logfile>\n"
            "  <logfile>\n    path %(d)s/small.log\n    max-size 1KB\n    old-files 2\n  </logfile>\n"
            "  <syslog>\n    facility local3\n  </syslog>\n"
            "</eventlog>\n" % {"d": tmp_path}
        )
    node.start()
    harness.wait_for("the node", node.listens)
    pid = node.process.pid
    for _ in range(10):
        Client(node.address).close()
    assert node.stop() == 0
    text = (tmp_path / "all.log").read_text()
    today = time.strftime("%d.%m.%Y")
    assert "------\n%s|INFO    |standby|%d|listening node=" % (today, pid) in text
    assert "|DEBUG   |" in text
    assert "<syslog> is ignored" in text
    assert not (tmp_path / "errors.log").exists()
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("small.log*")}
    assert set(sizes) == {"small.log", "small.log.1", "small.log.2"}
    assert max(sizes.values()) <= 1024


def peer_section(who, trusted):
    return "  <peer-ssl>\n    certificate %s\n    key %s\n    authenticate %s\n  </peer-ssl>\n" % (
        who[1],
        who[0],
        trusted,
    )


def test_nodes_show_certificates_to_each_other(nodes, tls, tmp_path):
    cluster = nodes.cluster()
    names = [node.name for node in cluster.nodes]
    made = {name: certificate(tmp_path, name, tls.authority) for name in names}
    for node in cluster.nodes:
        edit(node, "</standby>", peer_section(made[node.name], tls.authority[1]) + "</standby>")
    cluster.start()
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=1))
    cluster.primary().kill()
    client.commit(lambda root: root.update(x=2))
    for node in cluster.nodes:
        if node.process is None:
            node.start()
    cluster.wait_level()
    # A client that knows only a replica is passed on over TLS.
    replica = next(node for node in cluster.nodes if node is not cluster.primary())
    passed_on = Client(replica.address, wait_timeout=10)
    passed_on.commit(lambda root: root.update(x="y" * 3_000_000))
    passed_on.close()
    # One that has another certificate, or none, is not let in, and says why.
    replica.stop()
    edit(replica, made[replica.name][0], tls.stranger[0])
    edit(replica, made[replica.name][1], tls.stranger[1])
    replica.start()
    harness.wait_for("a refusal", lambda: "no TLS between the nodes" in replica.log())
    replica.stop()
    with open(replica.config_path) as config:
        text = config.read()
    with open(replica.config_path, "w") as config:
        config.write(text[: text.index("<peer-ssl>")] + text[text.index("</peer-ssl>") + 11 :])
    replica.start()
    others = [node for node in cluster.nodes if node is not replica]
    told = "this node has neither <peer-ssl>"
    harness.wait_for("a hint", lambda: told in replica.log())
    # With a new certificate, and nodes that have read the new list of those they trust, it is back.
    replica.stop()
    edit(replica, "</standby>", peer_section(tls.stranger, tls.authority[1]) + "</standby>")
    with open(tls.authority[1], "a") as trusted, open(tls.stranger[1]) as new:
        trusted.write(new.read())
    for node in others:
        node.signal(signal.SIGHUP)
    replica.start()
    cluster.wait_level()
    client.close()


def edit(node, old, new):
    with open(node.config_path) as config:
        text = config.read()
    assert old in text
    with open(node.config_path, "w") as config:
        config.write(text.replace(old, new))


def test_an_encrypted_key_and_its_password_function(nodes, tls, tmp_path, monkeypatch):
    plain, cert = tls.server
    encrypted = str(tmp_path / "encrypted.key")
    command = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", plain]
    subprocess.run(command + ["-out", encrypted], check=True, capture_output=True)
    (tmp_path / "site_passwords.py").write_text(
        "def right():\n    return 'secret'\n\ndef wrong():\n    return b'wrong'\n"
    )

    def server(name, function):
        line = "    key %s\n    %s\n" % (encrypted, function)
        zeo = tls.section(tls.folder).replace("    key %s\n" % plain, line)
        return nodes.alone(name, zeo=zeo).start()

    for name, function, reason in [
        ("none", "", 'there is no "password-function"'),
        ("nowhere", "password-function site_passwords.right", "No module named 'site_passwords'"),
    ]:
        node = server(name, function)
        assert node.wait() != 0
        assert reason in node.log()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    node = server("wrong", "password-function site_passwords.wrong")
    assert node.wait() != 0
    assert "is the password right?" in node.log()
    node = server("right", "password-function site_passwords.right")
    client = Client(node.address, ssl=tls.client(tls.known))
    client.commit(lambda root: root.update(x=1))
    client.close()


def test_the_secret_is_changed_while_nodes_run(nodes, tmp_path):
    secret = tmp_path / "secret"
    old, new = "the old one of 32 characters, more", "the new one of 32 characters, more"
    secret.write_text(old + "\n")
    cluster = nodes.cluster(options="  secret-file %s\n" % secret).start()
    first, second, third = cluster.nodes
    client = Client(cluster.addresses)
    client.commit(lambda root: root.update(x=0))

    def reread(text, *nodes):
        secret.write_text(text)
        for node in nodes:
            before = node.log().count("the secret-file was read again")
            node.signal(signal.SIGHUP)
            harness.wait_for(
                "SIGHUP", lambda: node.log().count("the secret-file was read again") > before
            )

    reread("%s\n\n%s\n" % (old, new), first, second, third)
    # The first one proves the new one already, the others still the old one.
    reread("%s\n\n%s\n" % (new, old), first)
    secret.write_text("%s\n\n%s\n" % (old, new))
    second.stop()
    second.start()
    cluster.wait_healthy()
    client.commit(lambda root: root.update(x=1))
    reread("%s\n\n%s\n" % (new, old), first, second, third)
    reread(new + "\n", first, second, third)
    third.stop()
    third.start()
    cluster.wait_healthy()
    # Who knows the old one only is a stranger now.
    third.stop()
    secret.write_text(old + "\n")
    third.start()
    harness.wait_for("a refusal", lambda: "have different secrets" in third.log())
    assert "have different secrets" in first.log()
    client.commit(lambda root: root.update(x=2))
    client.close()


def test_the_reply_to_a_commit_comes_after_its_invalidations(nodes, tmp_path):
    """On a busy machine, 2,000 times: whoever has the reply finds the others told. Over a Unix socket, where what one
    side has written the other side has."""
    path = str(tmp_path / "sock")
    node = nodes.alone()
    listen_at(node, path)
    node.start()
    harness.wait_for("the socket", lambda: os.path.exists(path))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    others = []
    try:
        for _ in range(30):
            others.append(registered(path, read_only=False))
        storage = open_storage(path)
        oid, serial = storage.new_oid(), z64
        missed = 0
        for number in range(2000):
            txn = transaction.TransactionManager().begin()
            storage.tpc_begin(txn)
            data = b"\x80\x02cpersistent\nPersistent\nq\x01.K%c." % (number % 100)
            storage.store(oid, serial, data, "", txn)
            storage.tpc_vote(txn)
            serial = storage.tpc_finish(txn)
            readable = select.select(others, [], [], 0)[0]
            missed += len(others) - len(readable)
            for sock in others:
                assert serial in receive(sock)
        storage.close()
    finally:
        for process in busy:
            process.kill()
            process.wait()
        for sock in others:
            sock.close()
    assert not missed
