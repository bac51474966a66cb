"""Iteration time against the network's bandwidth, for AdamW, MKOR and KFAC (KAISA) under DDP.

Starts 2 to 4 processes, each in a network namespace of its own, joined by a switch whose links are
shaped with tc (token buckets, both directions; nothing is added to the delay). Nothing outside the
namespaces is touched, and they are removed whatever happens. It needs root on Linux, for instance:

    sudo .venv/bin/python benchmarks/slow_network.py --out docs/results

It also takes the time that MKOR's step waits for its statistics (the range `mkor.reduce` of the
profile) beside a blocking all-reduce of the same buffer over the idle link.

Where namespaces are not permitted, and with --model, the processes run on the machine's own
loopback and a delay is computed instead: bytes that a process must send at best (counted at its
collectives) over the bandwidth, added to the measured time, as if nothing overlapped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from mkor.bench.compare import checked_contestants
from mkor.bench.contestants import Contestant
from mkor.bench.curves import COLOURS
from mkor.bench.errors import UsageError
from mkor.bench.files import FORMAT, write_record
from mkor.bench.machine import environment
from mkor.bench.overhead_models import model_subject
from mkor.bench.places import prepare_folder
from mkor.bench.processes_count import counted
from mkor.bench.processes_theory import period
from mkor.bench.tables import print_table
from mkor.bench.worker import Worker

CONTESTANTS = (
    "adamw,mkor+adamw,mkor[vectors=4]+adamw,kfac+adamw,kfac[update_every=10,inverse_every=10]+adamw"
)
SIZES = {"width": 768, "depth": 4, "rows": 256}
RATES = "10000,1000,100"
WARMUP, BLOCKING = 2, 5
LINK, PORT, LIMIT = "mkor0", 29500, timedelta(seconds=120)
BUFFER, LEAST_BURST = 16_000_000, 128_000
SPAN = "mkor.reduce"
LONGEST = 1200
"""Seconds that a run may take; on a quiet machine it takes four minutes."""
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------- the network


def run(*command: object) -> None:
    words = [str(word) for word in command]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


class Network:
    """A namespace for each process and one with a switch between them."""

    def __init__(self, world: int) -> None:
        self.places = [f"mkor-{os.getpid()}-{rank}" for rank in range(world)]
        self.switch = f"mkor-{os.getpid()}-switch"

    def build(self) -> None:
        for name in (*self.places, self.switch):
            run("ip", "netns", "add", name)
        run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(self.places):
            port = f"port{rank}"
            run("ip", "-n", self.switch, "link", "add", port, "type", "veth", "peer", LINK,
                "netns", name)  # fmt: skip
            run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")
            run("ip", "-n", name, "address", "add", f"{self.address(rank)}/24", "dev", LINK)
            for link in (LINK, "lo"):
                run("ip", "-n", name, "link", "set", link, "up")

    @staticmethod
    def address(rank: int) -> str:
        return f"10.77.0.{rank + 1}"

    def shape(self, megabits: int) -> None:
        """Both directions of every link; a queue that never overflows, a millisecond's burst."""
        burst = max(LEAST_BURST, megabits * 125)
        how = ("tbf", "rate", f"{megabits}mbit", "burst", burst, "limit", BUFFER)
        for rank, name in enumerate(self.places):
            for place, link in ((name, LINK), (self.switch, f"port{rank}")):
                run("tc", "-n", place, "qdisc", "replace", "dev", link, "root", *how)

    def remove(self) -> None:
        for name in (*self.places, self.switch):
            subprocess.run(["ip", "netns", "delete", name], check=False, stderr=subprocess.DEVNULL)


def remove_left_behind() -> None:
    """What a run that was killed outright could not remove."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True)
    for name in (line.split()[0] for line in listed.stdout.splitlines() if line):
        owner = name.split("-")[1] if name.startswith("mkor-") else ""
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            run("ip", "netns", "delete", name)


@contextmanager
def network(world: int) -> Iterator[Network | None]:
    """None where the machine does not permit it."""
    net = Network(world)
    try:
        try:
            remove_left_behind()
            net.build()
            net.shape(1000)
        except (OSError, subprocess.CalledProcessError) as error:
            told = getattr(error, "stderr", None) or str(error).encode()
            print(f"no namespaces or no tc here: {told.decode().strip()}", file=sys.stderr)
            yield None
            return
        yield net
    finally:
        net.remove()


# --------------------------------------------------------------------------------------- a process


def work(arguments: argparse.Namespace) -> None:
    """One of the processes: a line of JSON out for every line in."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = arguments.interface
    rank, world = arguments.rank, arguments.processes
    store = dist.TCPStore(arguments.address, arguments.port, world, rank == 0, LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=LIMIT)
    workers = [prepare(contestant) for contestant in checked_contestants(arguments.contestants)]
    sent = {worker.label: counted(worker.iterate, arguments.rounds) for worker in workers}
    names = [label for label in sent if label.startswith("mkor")]
    buffers = {
        label: sum(each.handed for each in sent[label] if each.kind == "statistics")
        for label in names
    }
    wire = {label: sum(c.wire for c in seen) / arguments.rounds for label, seen in sent.items()}
    print(json.dumps({"wire": wire}), flush=True)
    while sys.stdin.readline().strip():
        found = {"samples": time_all(workers, arguments.rounds), "overlap": {}}
        for worker in workers:
            if worker.label in names:
                size = buffers[worker.label] // arguments.rounds
                found["overlap"][worker.label] = {
                    "buffer_bytes": size,
                    "wait": waits(worker, arguments.rounds),
                    "blocking": [blocking(size) for _ in range(BLOCKING)],
                }
        print(json.dumps(found), flush=True)
    os._exit(0)


def prepare(contestant: Contestant) -> Worker:
    worker = Worker(contestant, model_subject("mlp", SIZES))
    worker.model = DistributedDataParallel(worker.model)
    for _ in range(WARMUP + 1):
        worker.iterate()
    return worker


def time_all(workers: list[Worker], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of whole iterations, in turn."""
    samples: dict[str, list[float]] = {worker.label: [] for worker in workers}
    for worker in workers:
        for _ in range(WARMUP):
            worker.iterate()
    for _ in range(rounds):
        for worker in workers:
            dist.barrier()
            start = time.perf_counter()
            worker.iterate()
            samples[worker.label].append(time.perf_counter() - start)
    return samples


def waits(worker: Worker, rounds: int) -> list[float]:
    """Wall seconds in the range `mkor.reduce` of each step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            dist.barrier()
            worker.iterate()
    return [1e-6 * e.time_range.elapsed_us() for e in profiler.events() if e.name == SPAN]


def blocking(size: int) -> float:
    """Wall seconds of an all-reduce of so many bytes, with nothing else on the links."""
    buffer = torch.ones(size // 4)
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(buffer)
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------ the whole


class Processes:
    """The processes, each in its place; none outlives the context."""

    def __init__(self, arguments: argparse.Namespace, net: Network | None) -> None:
        port = PORT if net else free_port()
        address = net.address(0) if net else "127.0.0.1"
        self.running = []
        for rank in range(arguments.processes):
            command = [sys.executable, __file__, "--rank", rank, "--address", address]
            command += ["--port", port, "--interface", LINK if net else "lo"]
            command += ["--processes", arguments.processes, "--rounds", arguments.rounds]
            command += ["--contestants", arguments.contestants]
            inside = ["ip", "netns", "exec", net.places[rank]] if net else []
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            words = [str(word) for word in (*inside, *command)]
            how = {"start_new_session": True, "env": os.environ | QUIET, **pipes}
            self.running.append(subprocess.Popen(words, **how))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def answers(self) -> list[dict]:
        lines = [process.stdout.readline() for process in self.running]
        if not all(lines):
            raise SystemExit("a process ended before its time; see above")
        return [json.loads(line) for line in lines]

    def ask(self) -> list[dict]:
        for process in self.running:
            process.stdin.write("go\n")
            process.stdin.flush()
        return self.answers()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(arguments: argparse.Namespace) -> dict:
    rates = [int(rate) for rate in arguments.rates.split(",")]
    with network(arguments.processes) if not arguments.model else nothing() as net:
        if net:
            net.shape(max(rates))
        with Processes(arguments, net) as processes:
            wire = processes.answers()[0]["wire"]
            results, found = [], []
            for rate in rates:
                if net:
                    net.shape(rate)
                # Without a network one measurement serves all.
                found = processes.ask() if net or not results else found
                results.append(summary(rate, found, None if net else wire))
                show(results[-1])
    return {"method": "tc" if net else "delay model", "wire_bytes": wire, "rates": results}


@contextmanager
def nothing() -> Iterator[None]:
    yield None


def summary(rate: int, found: list[dict], wire: dict[str, float] | None) -> dict:
    """Medians of the slowest process's times; means where work is done only every so often."""
    delay = {label: 8e-6 * size / rate for label, size in (wire or {}).items()}
    seconds, samples = {}, {}
    for label in found[0]["samples"]:
        slowest = map(max, zip(*(each["samples"][label] for each in found), strict=True))
        samples[label] = [each + delay.get(label, 0.0) for each in slowest]
        (contestant,) = checked_contestants(label)
        middle = statistics.median if period(contestant) == 1 else statistics.mean
        seconds[label] = middle(samples[label])
    overlap = {}
    for label, first in found[0]["overlap"].items() if wire is None else ():
        parts = [each["overlap"][label] for each in found]
        wait, call = (
            statistics.median(map(max, zip(*(part[key] for part in parts), strict=True)))
            for key in ("wait", "blocking")
        )
        size = first["buffer_bytes"]
        overlap[label] = {
            "buffer_bytes": size,
            "wait": wait,
            "blocking": call,
            "factor": call / wait,
        }
    return {"megabits": rate, "seconds": seconds, "samples": samples, "overlap": overlap}


def show(result: dict) -> None:
    base = next(iter(result["seconds"].values()))
    print(f"\n{result['megabits']} Mbit/s")
    rows = [
        (label, f"{1e3 * seconds:.1f}", f"{seconds / base:.2f}x")
        for label, seconds in result["seconds"].items()
    ]
    print_table(("contestant", "ms per iteration", "ratio"), rows, sys.stdout)
    for label, found in result["overlap"].items():
        print(
            f"{label}: waits {1e3 * found['wait']:.2f} ms in step; a blocking all-reduce of its "
            f"{found['buffer_bytes']:,} bytes takes {1e3 * found['blocking']:.2f} ms, "
            f"{found['factor']:.1f} times as long",
            flush=True,
        )


def draw(record: dict, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [result["megabits"] for result in record["rates"]]
    labels = record["rates"][0]["seconds"]
    for label, colour in zip(labels, COLOURS, strict=False):
        values = [1e3 * result["seconds"][label] for result in record["rates"]]
        axes.plot(rates, values, "o-", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(rates, [f"{rate:,}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("Mbit/s of each link")
    axes.set_ylabel("ms per iteration")
    how = "links shaped by tc" if record["method"] == "tc" else "computed delay"
    sizes = record["model"]["sizes"]
    axes.set_title(
        f"{record['processes']} processes, {sizes['depth']} layers of {sizes['width']}, {how}",
        fontsize=11,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", lw=0.7)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--contestants", default=CONTESTANTS, help="as in mkor compare; the first is the base")
    add("--processes", type=int, choices=(2, 3, 4), default=2)
    add("--rates", default=RATES, help=f"Mbit/s of each link ({RATES})")
    add("--rounds", type=int, default=10, help="timed iterations of each (10)")
    add("--model", action="store_true", help="compute delays instead of shaping links")
    add("--out", help="a folder for slow-network.json and slow-network.png")
    for name in ("--rank", "--port"):
        add(name, type=int, help=argparse.SUPPRESS)
    for name in ("--address", "--interface"):
        add(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments)
    try:
        checked_contestants(arguments.contestants)
        out = prepare_folder(arguments.out)
    except UsageError as error:
        parser.error(str(error))
    # Else whoever ends this script would leave the namespaces behind.
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.alarm(LONGEST)
    record = {
        "format": FORMAT,
        "model": {"name": "mlp", "sizes": SIZES},
        "processes": arguments.processes,
        "rounds": arguments.rounds,
        "environment": environment(),
        **measure(arguments),
    }
    if out is not None:
        write_record(record, out / "slow-network.json")
        draw(record, out / "slow-network.png")


if __name__ == "__main__":
    main()
