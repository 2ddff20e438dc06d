"""A run while it is under way.

Read start (what was asked for) with datasets (what it trains on) and models (opened, checked, loaded), engine
(DeepSpeed's), guards (what stands around a step), metrics, passes (the reference, the evaluation and other passes
without an update) and lifecycle (the run's folder). Beside them stand deepspeed_settings (of --deepspeed, and their
checks), signals, memory, monitors (TensorBoard and others), noise (of bfloat16), agreement (ranks that were given the
same) and other_trainers (what transformers and accelerate put into files and the environment).
"""
