"""Runs fuzz targets, each for some minutes and within memory in proportion to its input, and says what came of them.

    .venv-zeo6/bin/python fuzz/run.py [--minutes 10] [TARGET ...]

needs cargo-fuzz, a nightly compiler, and a Python with ZEO (for the seeds). A crash leaves its input in
`fuzz/artifacts`; `cargo +nightly fuzz run TARGET FILE` shows it again.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
# Bytes of an input, and megabytes that one allocation, and the process with the sanitizer's own memory, may take: a parser that
# answers a short input with more than that is a way to end a node.
LIMITS = ["-max_len=65536", "-malloc_limit_mb=64", "-rss_limit_mb=1024", "-timeout=10"]


def targets():
    listed = subprocess.run(
        ["cargo", "+nightly", "fuzz", "list"], cwd=os.path.dirname(HERE), check=True, capture_output=True, text=True
    )
    return listed.stdout.split()


def fuzz(target, minutes):
    """The number of runs, and what is wrong, if something is."""
    corpus = os.path.join(HERE, "corpus", target)
    os.makedirs(corpus, exist_ok=True)
    command = ["cargo", "+nightly", "fuzz", "run", target, "--", *LIMITS]
    command += ["-max_total_time=%d" % (60 * minutes), "-print_final_stats=1"]
    done = subprocess.run(command, cwd=os.path.dirname(HERE), capture_output=True, text=True, errors="replace")
    runs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    wrong = done.stderr[-4000:] if done.returncode else None
    return int(runs.group(1)) if runs else 0, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, if none is named")
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    chosen = options.targets or targets()
    subprocess.run([sys.executable, os.path.join(HERE, "seeds.py")], check=True)
    for target in chosen:
        print("building %s" % target, flush=True)
        subprocess.run(["cargo", "+nightly", "fuzz", "build", target], cwd=os.path.dirname(HERE), check=True)
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {pool.submit(fuzz, target, options.minutes): target for target in chosen}
        for ended in concurrent.futures.as_completed(running):
            runs, wrong = ended.result()
            print("%-14s %12s runs: %s" % (running[ended], runs, "FAILED" if wrong else "no crash"), flush=True)
            if wrong:
                failed += 1
                print(wrong, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
