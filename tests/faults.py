"""Nodes on machines with faults: see shim.c."""

import os
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))


class Faults:
    """The faults of one node's machine; they may change while it runs."""

    def __init__(self, directory):
        self.path = os.path.join(str(directory), "faults")
        os.makedirs(str(directory), exist_ok=True)
        shim = os.path.join(str(directory), "shim.so")
        source = os.path.join(HERE, "shim.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        self.within = ["env", "LD_PRELOAD=" + shim, "STANDBY_FAULTS=" + self.path]
        self.set()

    def set(self, *lines):
        with open(self.path + ".new", "w") as file:
            file.write("".join(line + "\n" for line in lines))
        os.replace(self.path + ".new", self.path)

    def hold(self, node):
        """The node is on this machine, from its next start on."""
        node.within = self.within
        return node
