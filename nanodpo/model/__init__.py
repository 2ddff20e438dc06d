"""Models: opened with nothing missing, adapted, made cheaper without another number, and checked.

Read source (a model or adapter, before its weights) and hub (where they may come from), loading (weights and LoRA, and
which policy is the reference), adapters, sharding (weights that the ranks of ZeRO-3 share), lora_settings
(--peft_config) and decay (which weights weight decay shrinks). What runs in every step is precision (--bf16), quantised
(bases in 4 or 8 bits), layers (a layer and its LoRA as one function, MLPs that keep less), kernels (for a GPU),
recompute (layers that backward computes again) and ulysses (a batch that several ranks share); selfcheck compares the
result with the model as it came. ready does all this, for policy, reference and checkpoint.
"""
