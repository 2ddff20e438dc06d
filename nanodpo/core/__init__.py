"""The lesson, in torch alone: from token ids to log-probabilities, and from those to a loss.

Read losses (DPO and SFT, down to the line that ends a first reading), then packing (what the model sees), batches
(pairs to packed batches), logprobs (the kernel), and attention (who sees whom, registered with transformers).
"""
