import logging
import warnings

import pytest

import cluster as harness

# Each lost connection is an error for ZEO's client, and a step of the test for us.
logging.getLogger("ZEO").setLevel(logging.CRITICAL)
logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)
warnings.simplefilter("ignore")


@pytest.fixture(params=["pickle", "msgpack"])
def encoding(request):
    """The configuration that makes the server announce each wire encoding."""
    return "  msgpack %s" % ("true" if request.param == "msgpack" else "false")


@pytest.fixture
def nodes(tmp_path):
    """Makes servers that are stopped after the test, whatever happens."""
    made = []

    class Factory:
        def alone(self, name="alone", **options):
            node = harness.Node(tmp_path / name, **options)
            made.append(node)
            return node

        def cluster(self, name="cluster", **options):
            cluster = harness.Cluster(tmp_path / name, **options)
            made.extend(cluster.nodes)
            return cluster

    yield Factory()
    for node in made:
        node.kill()
