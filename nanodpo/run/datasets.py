"""Reads the data sets of a run: what it trains on, and what it holds out."""

import functools

from ..data.limits import longest_allowed
from ..data.mixing import mix
from ..data.schedule import permutation
from ..data.template import template_for
from ..data.tokens import DataSet, check_weights, load_dataset
from ..errors import UserError
from ..folder import data_cache
from ..model.source import check_ids


def read_data(args, source, weights: list[float], date: str | None = None):
    """(training set as an epoch has it, held-out set or None, the longest sequence allowed in tokens, rows that take no
    part in the loss). `weights`: of --mix_weights; `date`: of the run, ISO. Raises UserError."""
    train, held_out, limit = load_data(args, source, date)
    if weights:
        mix(train, weights, args.seed)
    return train, held_out, limit, check_weights(train, held_out, args.without_rows)


def load_data(args, source, date: str | None = None):
    """(training set, held-out set or None, the longest sequence allowed in tokens). `date`: of the run, ISO."""
    template = template_for(source.tokenizer, args, date)
    limit = longest_allowed(args.max_length, source.context)
    pairs, keep = args.loss != "sft", functools.partial(data_cache.keep, args.cache_dir)
    train = load_dataset(args.train_file_path, template, args, limit, pairs, keep=keep)
    check_ids(source, train.path, train.examples)
    if args.eval_file_path:
        held_out = load_dataset(args.eval_file_path, template, args, limit, pairs, keep=keep)
        check_ids(source, held_out.path, held_out.examples)
        return train, held_out, limit
    if not args.eval_size:
        return train, None, limit
    rows = list(dict.fromkeys(example.row for example in train.examples))  # one may be several pairs, and stays whole
    n = len(rows)
    if args.eval_size >= n:
        raise UserError(f"--eval_size {args.eval_size}: {args.train_file_path} has {n} usable row{'s' * (n > 1)}; "
                        "hold out fewer")
    held = {rows[i] for i in permutation(n, f"{args.seed}/-1")[: args.eval_size]}
    parts = [[example for example in train.examples if (example.row in held) == out] for out in (True, False)]
    held_out = DataSet(f"{args.eval_size} rows of {train.path}", parts[0], [], {}, [])
    train.rows_in_file, train.rows_held_out, train.examples = n, args.eval_size, parts[1]
    return train, held_out, limit
