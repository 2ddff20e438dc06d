"""Marks in a figure how far bfloat16's rounding alone moves the numbers of a --bf16 run, which run/noise.py measures.

Every figure does it through `Marks`: a hatched band, its word in the legend and its sentence in the caption.
"""

import math
from pathlib import Path

from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ..errors import UserError, first_line
from ..files import read_json
from ..run.noise import LOGPS
from .axes import ABOVE_GRID

HATCH = {"facecolor": "none", "edgecolor": "0.7", "hatch": "//////", "linewidth": 0.3}


class Noise(dict):
    """{metric: standard deviation, nats} of one pair; a mean over n pairs has sqrt(n) times less. Empty of a run in
    float32."""

    @property
    def logps(self) -> float:
        """Of a log-prob per token of the noisier side; 0 where nothing is known."""
        return max(self.get(name, 0.0) for name in LOGPS)

    @property
    def gap(self) -> float:
        """Of chosen - rejected, whose roundings have nothing to do with one another."""
        return math.hypot(*(self.get(name, self.logps) for name in LOGPS))


class Marks:
    """Collects what one figure says of noise: `handles` for its legend, `caption` for the end of its caption."""

    def __init__(self, moved: str, then: str = ""):
        """`moved`: the numbers that the figure shows, as in "what rounding does to <a mean>"; `then` ends the
        sentence."""
        self.moved, self.then, self.handles, self.caption = moved, then, [], ""

    def band(self, ax, around: float, deviation: float, span: tuple[float, float] | None = None, **look) -> None:
        """Hatches two standard deviations to either side of a value, all over the x axis or along `span`; nothing
        where there is no noise."""
        if deviation:
            low, look = around - 2 * deviation, {**HATCH, "zorder": ABOVE_GRID} | look
            if span:
                ax.add_patch(Rectangle((span[0], low), span[1] - span[0], 4 * deviation, **look))
            else:
                ax.axhspan(low, low + 4 * deviation, **look)
            self.handles = [Patch(**HATCH, label="bfloat16 noise")]
            self.caption = (f" Hatched: what bfloat16's rounding alone does to {self.moved}, two standard deviations "
                            f"to either side{self.then}.")

    def not_measured(self, noises: list[Noise]) -> None:
        """For numbers of which run/noise.py knows no noise: says so, where one of these runs has some."""
        if any(noise.logps for noise in noises):
            self.handles = [Line2D([], [], linestyle="", label="bfloat16 noise: not measured")]
            self.caption = f" What bfloat16's rounding alone does to {self.moved} is not measured{self.then}."


def read_verdicts(file: Path) -> dict[str, Noise]:
    """{run: its noise} from a verdict.json: what lies beside scores that are not in their run's folder. Empty where
    there is no such file; raises UserError where it is not what score.py writes."""
    found = {}
    if not file.exists():
        return found
    lines = read_json(file)
    try:
        for line in lines:
            for name in LOGPS:
                numbers = line["numbers"].get(f"change of {name.rpartition('/')[2]}", {})
                if "run" in line and "noise" in numbers:
                    noise = numbers["noise"] / 2 * math.sqrt(numbers["n"])  # of a mean over n, twice the deviation
                    found.setdefault(line["run"], Noise())[name] = noise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is not what score.py writes ({first_line(error)})") from error
    return found
