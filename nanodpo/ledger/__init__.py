"""The ledger: splits the change of a log-probability during a run over the training pairs, and their two sides.

Read adamw (which gradient made how much of which update), probes (what changed), history (a run's checkpoints and
gradients, step by step), sweeps (through the run forwards, then backwards), report (tables and sentences), texts (of
the pairs that did most) and making (what it costs, and all of it in order).
"""
