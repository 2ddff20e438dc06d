"""Parts that the measurements share: a process for each contender, turns in rotation, honest peaks, tables and JSON.

Memory is the resident set of a fresh process: what the operating system had to find, whoever asked for it. Times are
medians over rounds in which every contender has one turn, so that a machine that slows down slows all of them. Beside
them stands processor time, which other people's work on the machine touches least.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed")


def machine() -> dict:
    """Processor, cores, memory, GPU and versions: what a number means nothing without."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "torch_kernels": torch.backends.cpu.get_cpu_capability(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "versions": versions,
            "load_average": os.getloadavg()[0], "when": datetime.datetime.now().isoformat(timespec="minutes")}


def resident() -> float:
    """Memory of this process now, MiB."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Linux: the high-water mark starts again from here. Raises OSError where a sandbox has no such file."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most memory this process had since reset_peak, MiB."""
    return _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


class Worker:
    """A fresh process that builds a contender with `build(**settings)` and calls its methods when told."""

    def __init__(self, build, threads: int = 0, resident_memory: bool = True, **settings):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, threads, resident_memory, settings),
                                       daemon=True)
        self.process.start()
        theirs.close()
        self.loaded = self._answer()

    def call(self, method: str, *args):
        """(the method's value, its seconds, its processor seconds). Raises RuntimeError with the worker's message."""
        self.pipe.send((method, args))
        return self._answer()

    def memory(self) -> tuple[float, float]:
        """(MiB once built, most MiB since)."""
        return self.loaded, self.call("")[0]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):  # one that failed is gone already
            self.pipe.send(None)
        self.process.join(30)

    def _answer(self):
        try:
            kind, value = self.pipe.recv()
        except EOFError as error:
            raise RuntimeError("the worker died, of memory perhaps") from error
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(pipe, build, threads: int, resident_memory: bool, settings: dict) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    if threads:
        torch.set_num_threads(threads)
    try:
        contender = build(**settings)
        if resident_memory:
            reset_peak()
        pipe.send(("ready", resident()))
        while (order := pipe.recv()) is not None:
            method, args = order
            wall, cpu = time.perf_counter(), time.process_time()
            value = getattr(contender, method)(*args) if method else peak()
            pipe.send(("value", (value, time.perf_counter() - wall, time.process_time() - cpu)))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def rounds(workers: dict[str, Worker], turns: list[tuple], warm_up: int = 1) -> dict[str, dict]:
    """Every worker in turn does turns[k] (method, *args): name -> seconds of both kinds after the warm-up, values."""
    found = {name: {"seconds": [], "cpu_seconds": [], "values": []} for name in workers}
    for k, turn in enumerate(turns):
        # The order changes from round to round: nobody always follows the same neighbour.
        names = list(workers)[k % len(workers):] + list(workers)[: k % len(workers)]
        for name in names:
            value, seconds, cpu = workers[name].call(*turn)
            found[name]["values"].append(value)
            if k >= warm_up:
                found[name]["seconds"].append(seconds)
                found[name]["cpu_seconds"].append(cpu)
    return found


def contest(workers: dict[str, Worker], turns: list[tuple]) -> dict[str, dict]:
    """`rounds`, what memory they took, and the workers' end: name -> spreads of seconds, MiB when built and above it,
    values."""
    found = rounds(workers, turns)
    for name, worker in workers.items():
        loaded, most = worker.memory()
        worker.close()
        found[name] |= {kind: spread(found[name][kind]) for kind in ("seconds", "cpu_seconds")}
        found[name] |= {"loaded_mib": round(loaded), "mib_above_loaded": round(most - loaded)}
    return found


def ratio(found: dict, base: dict, what: str = "seconds") -> str:
    """Of two contenders' medians."""
    return f"{found[what]['median'] / base[what]['median']:.2f}"


def can_run(name: str) -> bool:
    """Whether a contender's package is there."""
    return importlib.util.find_spec(name) is not None


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def show(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.3g} ({seconds['min']:.3g} to {seconds['max']:.3g})"


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(name: str, file: str | None, arguments: dict, results) -> None:
    """Everything measured, as JSON, beside this file unless told otherwise."""
    path = Path(file) if file else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a path its name: where it lay here tells a reader nothing.
    arguments = {key: Path(value).name if isinstance(value, str) and value.startswith("/") else value
                 for key, value in arguments.items()}
    record = {"benchmark": name, "arguments": arguments, "machine": machine(), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten: {path}")
