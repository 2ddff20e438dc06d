"""The ledger: splits the change of a log-probability during a run over the training pairs, and their two sides.

Read adamw (which gradient made how much of which update), history (a run's checkpoints and gradients, step by step),
sweeps (through the run forwards, then backwards) and report (tables and sentences).
"""
