"""The figure of a ledger: how the forces of the pairs' two sides added up over the run, and which pairs did most."""

from pathlib import Path

import pandas
from matplotlib import rcParams
from matplotlib.patches import Patch

from ..errors import UserError
from ..files import read_json
from ..ledger.texts import of_mean
from .axes import COLOURS, GREY, add_legend, grid, listed, plain, wrap
from .noise import Marks, Noise
from .tables import read_parquet

COLUMNS = ["run", "dataset", "response", "step", "side", "share"]
FORCES = {"chosen": ("from chosen halves", COLOURS[0], "-"), "rejected": ("from rejected halves", COLOURS[1], "--"),
          "weight_decay": ("from weight decay", COLOURS[2], ":")}
RAISED, LOWERED = COLOURS[2], COLOURS[3]
NAMED = 5  # pairs at each end


def read_ledger(folder: Path) -> tuple[pandas.DataFrame, list[dict]]:
    """(ledger.parquet, ledger.json) of a folder, the means over data sets alone; of single rows nothing. Raises
    UserError."""
    file = folder / "ledger.parquet"
    if not file.exists():
        raise UserError(f"{file}: is not there; score.py makes it where it is told --ledger ROWS")
    table = read_parquet(file, COLUMNS, more=("row", "pair"), gaps=("row", "pair"))
    records = read_json(folder / "ledger.json", 2**32)
    try:
        records = [record for record in records if record["row"] is None]
        for record in records:
            _ = [record["dataset"], record["response"], record["change"] + 0.0, record["residual"] + 0.0,
                 [level + 0.0 for level in record["levels"]], [f"{why}" for why in record.get("doubts", [])],
                 ["".join(texts) for texts in record.get("texts", {}).values()]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'ledger.json'}: is not what score.py writes ({type(error).__name__}: {error})"
                        ) from error
    return table[table["row"].isna()], records


def ledger_figure(folder: Path, columns: int, noise: Noise | None = None):
    """Two panels a response: forces over steps, and a waterfall of pairs. `noise` is that of the run in bfloat16.
    Returns (figure, caption)."""
    table, records = read_ledger(folder)
    if not records:
        raise UserError(f"{folder / 'ledger.parquet'}: has single rows alone; the figure is of means, --ledger ROWS")
    fig, axes = grid(2 * len(records), 2, columns, height=1.9, sharex=False)
    several = len({record["dataset"] for record in records}) > 1
    for record, left, right in zip(records, axes[::2], axes[1::2]):
        here = of_mean(table, record)
        name = f"{record['dataset']}, {record['response']}" if several else record["response"]
        # The first word of each doubt: unreliable, ill-conditioned. The caption has all of them.
        _forces(left, here, record, ", ".join([name, *(why.partition(":")[0] for why in record.get("doubts", []))]))
        _waterfall(right, here, record)
    axes[0].set_title("summed over the steps so far", fontsize=rcParams["legend.fontsize"])
    axes[1].set_title("summed over the pairs, one after the other", fontsize=rcParams["legend.fontsize"])
    axes[-1].set_xlabel("change of the log-prob (nats per token)")
    marks = Marks("a pair's share")
    marks.not_measured([noise or Noise()])
    pairs = [Patch(color=LOWERED, label="pairs that lowered it"), Patch(color=RAISED, label="pairs that raised it")]
    add_legend(fig, axes[0].get_legend_handles_labels()[0] + pairs + marks.handles, table["run"].iloc[0])
    doubts = [f" Of {record['response']} on {record['dataset']} the shares are {why}." for record in records
              for why in record.get("doubts", [])]
    first = records[0]
    rows = listed(dict.fromkeys(f"{(n := record['rows'])} row{'s' * (n > 1)} of {record['dataset']}"
                                for record in records))
    caption = (f"What changed the mean log-prob per token over {rows} in "
               f"{first['run']}, {first['steps']} steps. Left: the sum so far of what the chosen and the rejected "
               "sides of the pairs of each step made of the final change, their sum, and the log-prob as it was. "
               "Right: the pairs that lowered and raised it most, by their rows in the training data, and all others.")
    return fig, caption + "".join(doubts) + marks.caption


def _forces(ax, table: pandas.DataFrame, record: dict, name: str) -> None:
    steps = range(record["steps"] + 1)
    made = {side: part.groupby("step")["share"].sum().reindex(range(record["steps"]), fill_value=0.0)
            for side, part in table.groupby("side", sort=False)}
    curves = {side: [0.0, *made[side].cumsum()] for side in FORCES if side in made}
    for side, values in curves.items():
        label, colour, dash = FORCES[side]
        ax.plot(steps, values, color=colour, linestyle=dash, label=label)
    ax.plot(steps, [sum(values) for values in zip(*curves.values())], color="black", linewidth=1.4, label="their sum")
    ax.plot(steps, [level - record["levels"][0] for level in record["levels"]], color=GREY, linewidth=0.8,
            linestyle=(0, (1, 1)), label="the log-prob as it was, since step 0")
    ax.axhline(0, color=GREY, linewidth=0.5)
    ax.set_ylabel(f"{wrap(name, 24)}\n(nats per token)")


def _waterfall(ax, table: pandas.DataFrame, record: dict) -> None:
    """Bars that follow one another from 0 to the change, the first on top."""
    net = table.dropna(subset="pair").groupby("pair")["share"].sum().sort_values()
    down, up = net[net < 0], net[net > 0].iloc[::-1]  # a row that was left out did neither
    bars = [(f"row {int(pair)}", share) for pair, share in down.iloc[:NAMED].items()]
    bars += [(f"others that lowered it: {len(down) - NAMED}", down.iloc[NAMED:].sum())] * (len(down) > NAMED)
    bars += [(f"others that raised it: {len(up) - NAMED}", up.iloc[NAMED:].sum())] * (len(up) > NAMED)
    bars += [(f"row {int(pair)}", share) for pair, share in up.iloc[:NAMED].iloc[::-1].items()]
    if (decay := table[table["side"] == "weight_decay"]["share"].sum()) != 0:
        bars.append(("weight decay", decay))
    bars.append(("left over", record["change"] - sum(share for _, share in bars)))
    at = 0.0
    for i, (_, share) in enumerate(bars):
        ax.barh(i, share, left=at, height=0.7, color=RAISED if share >= 0 else LOWERED)
        at += share
    ax.barh(len(bars), record["change"], height=0.7, color="black")
    ax.axvline(0, color=GREY, linewidth=0.5)
    ax.use_sticky_edges = False  # else the longest bar would touch the axis
    ax.margins(x=0.05)
    ax.locator_params(axis="x", nbins=4, integer=False)  # labels like -0.0125 are long
    ax.set_yticks(range(len(bars) + 1), [plain(name) for name, _ in bars] + ["change"])
    ax.tick_params(axis="y", length=0, labelsize=5)
    ax.invert_yaxis()
