"""Scores responses under checkpoints: log-probs, their tables, and a verdict.

Read flags, runs (which checkpoints there are) with recorded (the settings of their runs), datasets and responses (what
is scored), plan (which results are asked for, and missing), opened (checkpoints in memory), measures, plausible and
risers (what is taken along a response), sections and pairs (of its parts, of two responses), answers (greedy ones,
checked), then describe, means and tables, estimates, changes and verdict (what became of a run) and side_by_side.
contents and parts are how a scoring that was stopped, or asked for more, goes on.
"""
