"""What README.md and docs/operations.md tell people to write and to type is what works."""

import glob
import os
import re
import subprocess

import pytest
import transaction
import ZODB.config

import cluster as harness
from test_transport import certificate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DOCUMENTS = [os.path.join(ROOT, name) for name in ("README.md", "docs/operations.md")]


def blocks():
    """The indented blocks, each as a list of lines without the indent that they share."""
    found, block = [], []
    for document in DOCUMENTS:
        with open(document) as lines:
            lines = [*lines, "the end\n"]
        for line in lines:
            if line.startswith("    "):
                block.append(line.rstrip("\n"))
            elif line.strip():
                if block:
                    indent = min(len(each) - len(each.lstrip()) for each in block)
                    found.append([each[indent:] for each in block])
                block = []
    return found


def block(beginning):
    (only,) = (block for block in blocks() if block[0].startswith(beginning))
    return "\n".join(only) + "\n"


class AsDocumented(harness.Node):
    """A node whose file is the one of the README, with other addresses and directories."""

    def __init__(self, directory, name, text):
        super().__init__(directory, name)
        with open(self.config_path, "w") as config:
            config.write(text)


def first_cluster(tmp_path, inside=""):
    """Three nodes from the README's file: the same but for the addresses and `node`."""
    document = block("<zeo>")
    nodes = [AsDocumented(tmp_path / name, name, "") for name in ("n1", "n2", "n3")]
    for number, node in enumerate(nodes, 1):
        text = document.replace("node               n1", "node               n%d" % number)
        text = re.sub(r"(  member .*\n)+", lambda lines: lines.group(0).replace("10.0.0.", "member-10.0.0."), text)
        for port, own in (("8100", node.port), ("8101", node.read_only_port), ("8102", node.peer_port)):
            text = text.replace(" 10.0.0.1:%s" % port, " 127.0.0.1:%d" % own)
        text = text.replace("127.0.0.1:8103", "127.0.0.1:%d" % node.admin_port)
        for other, each in enumerate(nodes, 1):
            text = text.replace("member-10.0.0.%d:8102" % other, "127.0.0.1:%d" % each.peer_port)
        text = text.replace("/srv/standby/secret", str(tmp_path / "secret"))
        text = text.replace("/srv/standby", node.directory).replace("</standby>", inside + "</standby>")
        with open(node.config_path, "w") as config:
            config.write(text)
    (tmp_path / "secret").write_bytes(b"as good as any secret of 32 bytes")
    return nodes


def test_the_first_cluster_and_its_clients(tmp_path):
    nodes = first_cluster(tmp_path)
    try:
        for node in nodes:
            node.start()
        servers = block("server 10.0.0.1")
        for number, node in enumerate(nodes, 1):
            servers = servers.replace("10.0.0.%d:8100" % number, "127.0.0.1:%d" % node.port)
        section = "<zodb>\n<zeoclient>\n%s</zeoclient>\n</zodb>\n" % servers
        db = ZODB.config.databaseFromString(section)
        with db.transaction() as connection:
            connection.root()["x"] = 1
        db.close()
        transaction.abort()
        # Two of three are a cluster: the third may come later.
        harness.wait_for("the third node", lambda: "n1" in nodes[2].ask("status"))
        assert "n3" in nodes[2].ask("status")
    finally:
        for node in nodes:
            node.kill()


def test_the_section_for_encryption(tmp_path):
    section = block("<peer-ssl>")
    authority = certificate(tmp_path, "authority")
    certificate(tmp_path, "n1", authority)
    nodes = first_cluster(tmp_path, section.replace("/srv/standby", str(tmp_path)))
    checked = subprocess.run(
        [harness.STANDBY, "serve", "--check", "-C", nodes[0].config_path], capture_output=True, text=True
    )
    assert checked.returncode == 0 and "is fine" in checked.stdout, checked.stderr


def commands():
    """The commands of the documents, without what they are about."""
    lines = (line.split("#")[0].strip() for block in blocks() for line in block)
    lines = [line for line in lines if line.startswith("standby ")]
    assert len(lines) > 12
    return lines


def help_of(words):
    helped = subprocess.run([harness.STANDBY, *words, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    return helped.stdout


@pytest.mark.parametrize("line", commands())
def test_commands_are_known_with_their_options(line):
    before = []
    for each in line.removeprefix("standby ").split("|"):
        words = re.sub(r"[\[\]]", " ", each).split()
        known = list(before)
        for word in words:
            helped = help_of(known)
            if word.startswith("-") or "\nCommands:" not in helped:
                break
            assert re.search(r"\n  %s(\s|$)" % re.escape(word), helped), "there is no such command"
            known.append(word)
        for option in (word for word in words if word.startswith("-")):
            assert re.search(r"(^|\s)%s(\W|$)" % re.escape(option), help_of(known), re.M), option
        # What follows a bar stands for the last word.
        before = known[:-1]


def test_links_lead_to_files_and_sections():
    pages = [*glob.glob(ROOT + "/*.md"), *glob.glob(ROOT + "/docs/**/*.md", recursive=True)]
    assert len(pages) > 30
    for page in pages:
        with open(page) as lines:
            text = lines.read()
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            path, _, section = target.partition("#")
            path = os.path.join(os.path.dirname(page), path) if path else page
            assert os.path.exists(path), (page, target)
            if section:
                with open(path) as lines:
                    titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
                assert section in [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
