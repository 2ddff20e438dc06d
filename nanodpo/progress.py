"""Shows the progress of a long work: a bar on a terminal or in a notebook, and elsewhere a line every half minute."""

import datetime
import sys
import time

from tqdm.auto import tqdm

from .ranks.distributed import is_main
from .screen import printable, put

EVERY = 30.0  # seconds from one line to the next
NOTEBOOK = any(kind.__module__ == "tqdm.notebook" for kind in tqdm.__mro__)  # what tqdm.auto has chosen


class Progress:
    """Counts the units of a work that are done, and shows them on rank 0: `with Progress("reference", 100, "step") as
    bar`. `total`: None where nobody knows it; `done`: units that were done before; `here`: whether this rank shows
    them, where it is not rank 0 that does.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0, here: bool | None = None):
        here = is_main() if here is None else here
        # Lines go to stdout, the bar to stderr. Where one of them goes elsewhere (`| tee log`), a line would end up
        # behind the bar.
        bar = NOTEBOOK or sys.stdout.isatty() and sys.stderr.isatty()
        self.what, self.total, self.unit, self.done, self.start = printable(what), total, unit, done, done
        self.units = f"{unit}{'e' * unit.endswith('ch')}s"
        self.lines, self.began = here and not bar, time.monotonic()
        self.said = self.began
        self.bar = tqdm(desc=self.what, total=total, initial=done, unit=unit, dynamic_ncols=True, leave=False, delay=1,
                        disable=not (here and bar))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def begin(self) -> None:
        """Starts the clock where no unit is done yet: what came before, as loading a model, is no unit's time."""
        if self.done == self.start == 0:
            self.began = time.monotonic()
            self.bar.reset()

    def update(self, count: int = 1, text: str | None = None) -> None:
        """Counts units that are done; `text` stands at the end of the bar."""
        if self.total is not None:
            count = min(count, self.total - self.done)  # ranks count for each other, and the last ones may have less
        self.done += count
        if text is not None:
            self.bar.set_postfix_str(printable(text), refresh=False)
        self.bar.update(count)
        if self.lines and time.monotonic() - self.said >= EVERY and self.start < self.done != self.total:
            of_all = "" if self.total is None else f" of {self.total:,}"
            put(f"{self.what}: {self.done:,}{of_all} {self.units}, {self.timing()}")

    def timing(self) -> str:
        """Seconds a unit, the time so far, and about how long the rest takes, where its size is known. The next line
        waits for EVERY seconds."""
        self.said = time.monotonic()
        spent = self.said - self.began
        each = spent / max(1, self.done - self.start)
        left = "" if self.total is None else f", about {_clock(each * (self.total - self.done))} to go"
        return f"{each:{'.1f' if each >= 1 else '.2g'}} s a {self.unit}, {_clock(spent)} so far{left}"


def _clock(seconds: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=round(seconds))


def track(items, what: str, unit: str):
    """Yields the items, and counts one as done when the next is asked for."""
    with Progress(what, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


def show(bar: Progress, line: dict, print_it: bool) -> None:
    """Moves the bar by a step and, where asked, prints the step's means; without a bar also the progress and time."""
    if print_it:
        bar.said = time.monotonic()  # its own line says it
    bar.update(text=f"loss {line['loss']:.4f}")
    if print_it:
        timing = f", {bar.timing()}" if bar.lines else ""
        put(f"step {line['step']:>5}  {summary(line)}  {line['perf/tokens_per_second']:,.0f} tokens/s{timing}")


def summary(means: dict) -> str:
    """A step's means in a line that fits 80 columns; metrics.jsonl has them all, by TRL's names."""
    pairs = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    names = {"loss": "loss"} | (pairs if "rewards/margins" in means else {"chosen": "logps_per_token/chosen"})
    return "  ".join(f"{name} {means[key]:.4f}" for name, key in names.items())
