"""What `standby router` adds to a round trip: the same call directly and through it, in turn, in the same run.

    python bench/router.py [--calls 3000] [--rounds 5]

needs the program (cargo build --release) and a Python with ZEO.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests"))

import cluster as harness  # noqa: E402
from loads import RawClient  # noqa: E402


def round_trips(client, calls):
    """Microseconds of each call, sorted."""
    times = []
    for number in range(calls):
        begun = time.perf_counter()
        client.call(number + 2, "ping")
        client.receive()
        times.append((time.perf_counter() - begun) * 1e6)
    return sorted(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000, help="in each round, each way")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        node = harness.Node(os.path.join(directory, "node"))
        router = harness.Router(os.path.join(directory, "router"), [node.address])
        try:
            node.start()
            router.start()
            ways = {"directly": RawClient(node.port), "through the router": RawClient(router.writes[1])}
            for client in ways.values():
                round_trips(client, options.calls)
            measured = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, client in ways.items():
                    measured[way].append(round_trips(client, options.calls))
        finally:
            router.stop()
            node.stop()
    print("a round trip in µs, medians of %d rounds of %d calls:" % (options.rounds, options.calls))
    medians = {}
    for way, rounds in measured.items():
        half, most = (statistics.median(each[int(len(each) * part)] for each in rounds) for part in (0.5, 0.95))
        medians[way] = half
        print("%-20s %6.0f (95 %% within %.0f)" % (way, half, most))
    print("the router adds %.0f µs" % (medians["through the router"] - medians["directly"]))


if __name__ == "__main__":
    main()
