"""How often an epoch has the rows of each of several data sets."""

import itertools

from ..errors import UserError
from .places import places_of
from .schedule import permutation
from .tokens import DataSet


def read_weights(text: str | None, path: str) -> list[float]:
    """The numbers of --mix_weights, one for each data set that `path` names; none where it is not given. Raises
    UserError."""
    if text is None:
        return []
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError as error:
        raise UserError(f"--mix_weights {text}: must be numbers with commas between, like 1,0.5") from error
    if bad := [weight for weight in weights if not 0 < weight <= 1000]:
        raise UserError(f"--mix_weights {text}: {bad[0]:g} must be above 0 and at most 1000; it says how often an "
                        "epoch has each row of a data set")
    if len(weights) != (count := len(places_of(path))):
        raise UserError(f"--mix_weights {text}: is {len(weights)} number{'s' * (len(weights) > 1)}, and "
                        f"--train_file_path {path} names {count} data set{'s' * (count > 1)}")
    return weights


def mix(data: DataSet, weights: list[float], seed: int) -> None:
    """Gives a data set the rows of an epoch: every row of its k-th part as often as weights[k] says. The fraction of a
    weight is that part of the rows, rounded; drawn by `seed`, they are the same in every epoch. Raises UserError where
    a part has no rows in an epoch."""
    data.unmixed, data.rows_in_file = data.examples, data.rows_in_file or data.rows
    mixed, total, words = [], 0, []
    borders = [*itertools.accumulate(data.sizes, initial=0)]
    for k, (name, weight) in enumerate(zip(places_of(data.path), weights)):
        own = [example for example in data.examples if borders[k] <= example.row < borders[k + 1]]
        whole, part = divmod(weight, 1)
        rows = list(dict.fromkeys(example.row for example in own))
        # -1 is the held-out rows'
        drawn = {rows[i] for i in permutation(len(rows), f"{seed}/{-2 - k}")[: round(part * len(rows))]}
        found = [*own * int(whole), *(example for example in own if example.row in drawn)]
        if not found:
            raise UserError(f"--mix_weights {weight:g}: leaves none of {len(rows)} usable rows of {name} to train on")
        count = len(rows) * int(whole) + len(drawn)
        words.append(f"{count} of {name} ({weight:g} times {len(rows)})")
        mixed += found
        total += count
    data.examples, data.mixture = mixed, f"an epoch has {total} rows: {', '.join(words)}"
