"""Step time against the network's bandwidth, for AdamW, MKOR and KFAC (KAISA) under DDP.

Starts 2 to 4 processes, each in a network namespace of its own, joined by a switch whose links are
shaped with tc (token buckets, both directions; nothing is added to the delay). Nothing outside the
namespaces is touched, and they are removed whatever happens. It needs root on Linux, for instance:

    sudo .venv/bin/python benchmarks/slow_network.py --out slow-network.json

It also takes the time that MKOR's step waits for its statistics (the range `mkor.reduce` of the
profile) beside a blocking all-reduce of the same bytes over the idle link.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from mkor.bench.bytes_sent import collectives, period
from mkor.bench.contestants import parse_contestants
from mkor.bench.models import Worker, model_subject
from mkor.bench.results import FORMAT, environment, write_record
from mkor.bench.show import print_table

CONTESTANTS = (
    "adamw,mkor+adamw,mkor[vectors=4]+adamw,kfac+adamw,kfac[update_every=10,inverse_every=10]+adamw"
)
SIZES = {"width": 768, "depth": 4, "rows": 256}
WARMUP, BLOCKING = 3, 5
LINK, PORT, LIMIT = "mkor0", 29500, timedelta(seconds=120)
QUEUE, LEAST_BURST = 16_000_000, 128_000
LONGEST = 1200
"""Seconds that a run may take; on a quiet machine it takes four minutes."""
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


class Network:
    """A namespace for each process and one with a switch between them; none outlives it."""

    def __init__(self, world: int) -> None:
        self.places = [f"mkor-{os.getpid()}-{rank}" for rank in range(world)]
        self.switch = f"mkor-{os.getpid()}-switch"

    def __enter__(self) -> Network:
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def build(self) -> None:
        for name in (*self.places, self.switch):
            run("ip", "netns", "add", name)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(self.places):
            pair = ("add", f"port{rank}", "type", "veth", "peer", LINK, "netns", name)
            run("ip", "-n", self.switch, "link", *pair)
            run("ip", "-n", self.switch, "link", "set", f"port{rank}", "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", LINK)
            for link in (LINK, "lo"):
                run("ip", "-n", name, "link", "set", link, "up")

    def shape(self, megabits: int) -> None:
        """Both directions of every link; a queue that never overflows, a millisecond's burst."""
        burst = max(LEAST_BURST, megabits * 125)
        how = ("tbf", "rate", f"{megabits}mbit", "burst", burst, "limit", QUEUE)
        for rank, name in enumerate(self.places):
            for place, link in ((name, LINK), (self.switch, f"port{rank}")):
                run("tc", "-n", place, "qdisc", "replace", "dev", link, "root", *how)

    def __exit__(self, *_: object) -> None:
        for name in (*self.places, self.switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def run(*command: object) -> None:
    words = [str(word) for word in command]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def work(rank: int, arguments: argparse.Namespace) -> None:
    """One of the processes: a line of JSON out for every line in."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = LINK
    world, rounds = arguments.processes, arguments.rounds
    store = dist.TCPStore("10.77.0.1", PORT, world, rank == 0, LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=LIMIT)
    workers = [
        Worker(contestant, model_subject("mlp", SIZES))
        for contestant in parse_contestants(arguments.contestants)
    ]
    for worker in workers:
        worker.model = DistributedDataParallel(worker.model)
    while sys.stdin.readline().strip():
        seconds = {worker.label: [] for worker in workers}
        for index in range(-WARMUP, rounds):
            for worker in workers:
                dist.barrier()
                marks = worker.iterate()
                if index >= 0:
                    seconds[worker.label].append(marks[-1][1] - marks[0][1])
        mkor = [worker for worker in workers if worker.label.startswith("mkor")]
        waits = {worker.label: waiting(worker, rounds) for worker in mkor}
        print(json.dumps({"seconds": seconds, "waits": waits}), flush=True)
    os._exit(0)


def waiting(worker: Worker, rounds: int) -> dict[str, float]:
    """Bytes of statistics, seconds in `mkor.reduce`, and of an all-reduce of the same bytes."""
    with collectives() as seen:
        worker.iterate()
    size = sum(each.handed for each in seen if each.kind == "statistics")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            dist.barrier()
            worker.iterate()
    spans = [1e-6 * e.cpu_time_total for e in profiler.events() if e.name == "mkor.reduce"]
    buffer, blocking = torch.ones(size // 4), []
    for _ in range(BLOCKING):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(buffer)
        blocking.append(time.perf_counter() - start)
    wait, call = statistics.median(spans), statistics.median(blocking)
    return {"bytes": size, "wait": wait, "blocking": call}


def measure(arguments: argparse.Namespace) -> list[dict]:
    """A result for each rate: the slowest process's times."""
    command = [sys.executable, __file__, "--processes", arguments.processes]
    command += ["--rounds", arguments.rounds, "--contestants", arguments.contestants, "--rank"]
    running, results = [], []
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with Network(arguments.processes) as net:
        try:
            for rank, place in enumerate(net.places):
                words = [str(word) for word in ("ip", "netns", "exec", place, *command, rank)]
                running.append(subprocess.Popen(words, env=os.environ | QUIET, **how))
            for rate in map(int, arguments.rates.split(",")):
                net.shape(rate)
                for process in running:
                    process.stdin.write("go\n")
                    process.stdin.flush()
                lines = [process.stdout.readline() for process in running]
                if not all(lines):
                    raise SystemExit("a process ended before its time; see above")
                results.append({"megabits": rate, **slowest([json.loads(line) for line in lines])})
                show(results[-1])
        finally:
            for process in running:
                process.kill()
                process.wait()
    return results


def slowest(found: list[dict]) -> dict:
    """Medians of the slowest process's times; means where work is done only every so often."""
    seconds = {}
    for label in found[0]["seconds"]:
        samples = list(map(max, zip(*(each["seconds"][label] for each in found), strict=True)))
        (contestant,) = parse_contestants(label)
        middle = statistics.median if period(contestant) == 1 else statistics.fmean
        seconds[label] = middle(samples)
    waits = {
        label: {key: max(each["waits"][label][key] for each in found) for key in first}
        for label, first in found[0]["waits"].items()
    }
    return {"seconds": seconds, "waits": waits}


def show(result: dict) -> None:
    print(f"\n{result['megabits']} Mbit/s")
    base = next(iter(result["seconds"].values()))
    rows = []
    for label, seconds in result["seconds"].items():
        wait = result["waits"].get(label)
        cells = (f"{1e3 * wait['wait']:.2f}", f"{1e3 * wait['blocking']:.2f}") if wait else ("", "")
        rows.append((label, f"{1e3 * seconds:.1f}", f"{seconds / base:.2f}x", *cells))
    headers = ("contestant", "ms per step", "ratio", "waits in step, ms", "blocking sum, ms")
    print_table(headers, rows, sys.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--contestants", default=CONTESTANTS, help="as in mkor compare; the first is the base")
    add("--processes", type=int, choices=(2, 3, 4), default=2)
    add("--rates", default="10000,1000,100", help="Mbit/s of each link (10000,1000,100)")
    add("--rounds", type=int, default=10, help="timed steps of each (10)")
    add("--out", type=Path, help="a JSON file for all figures")
    add("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments.rank, arguments)
    # Else whoever ends this script would leave the namespaces behind.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.alarm(LONGEST)
    rates = measure(arguments)
    if arguments.out:
        made = {"format": FORMAT, "environment": environment(), "rounds": arguments.rounds}
        shown = {"processes": arguments.processes, "model": {"name": "mlp", "sizes": SIZES}}
        write_record(made | shown | {"rates": rates}, arguments.out)


if __name__ == "__main__":
    main()
