"""Trains, then computes the reference again with the trained engine; launched by test_train.py on two ranks."""

import json

import train
from nanodpo.data.example import SIDES
from nanodpo.model.loading import reference_policy
from nanodpo.ranks.distributed import sum_over_ranks
from nanodpo.run import lifecycle
from nanodpo.run.passes import logps_of


def score(run, indices):
    return logps_of(run, [run.train_set.examples[i] for i in indices], SIDES, "the reference")


def compare(run):
    """In place of lifecycle.finish: every reference log-prob from the same rows, through the adapter-free model."""
    import torch

    from nanodpo.data.schedule import micro_batches_of, pairs_of_step

    n, again = len(run.train_set.examples), torch.zeros_like(run.ref)
    rows = [row for step in range(run.steps_per_epoch)
            for row in micro_batches_of(pairs_of_step(n, run.pairs_per_step, run.args.seed, step), 1, run.rank,
                                        run.world)]
    trained = torch.zeros_like(run.ref)
    for indices, factor in rows:
        with reference_policy(run.engine.module.model, adapter_off=True):
            again[indices] += factor * score(run, indices)
        trained[indices] += factor * score(run, indices)
    again, trained = sum_over_ranks(again), sum_over_ranks(trained)
    if run.rank == 0:
        result = {"largest_difference": (again - run.ref).abs().max().item(),
                  "moved": bool((trained - run.ref).abs().max() > 1e-3)}
        (run.folder / "again.json").write_text(json.dumps(result))


if __name__ == "__main__":  # pytest looks for doctests here too
    lifecycle.finish = compare
    train.exit_process(train.run_script(train.main))
