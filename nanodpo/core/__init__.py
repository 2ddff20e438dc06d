"""The lesson, in plain PyTorch: from token ids to log-probabilities, and from those to a loss.

Read packing (pairs to batches: what the model sees), logprobs (the kernel), losses (DPO and SFT, down to the line that
ends a first reading), then attention (who sees whom, registered with transformers).
"""
