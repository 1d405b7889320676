"""A pack follows what ZODB follows."""

import random

import records


def test_the_scan_follows_what_zodb_follows():
    rng = random.Random(17)
    with records.Scan() as scan:
        for _ in range(10_000):
            records.compare(rng, scan)
