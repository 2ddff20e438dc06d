"""Scores responses under checkpoints: log-probs, their tables, and a verdict.

Read runs (which checkpoints there are), responses (what is scored beside the data's own answers), opened (checkpoints
in memory), measures and plausible (what is taken along a response), sections and pairs (of its parts, of two
responses), answers (greedy ones, checked), then describe, means and scores (the tables), estimates and verdict (what
became of a run) and side_by_side. needs, contents and parts are how a scoring that was stopped, or asked for more, goes
on.
"""
