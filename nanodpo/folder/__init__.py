"""A run's folder: files that are whole or not there, checkpoints, states to go on from, the record of the run.

Read atomic (how everything is written), record (run.json; a folder found, claimed and locked) with same_run (whether it
holds this very run) and elastic (a step's pairs on any number of ranks), log (metrics.jsonl), checkpoint and card
(weights, and a card and log beside them), resume and state (going on), fork (a new run that goes on from another's
state), reference (the reference's log-probs, kept) and data_cache (prepared data, kept).
"""
