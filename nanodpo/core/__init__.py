"""The lesson, in torch alone: from token ids to log-probabilities, and from those to a loss.

Read losses (DPO and SFT, down to the line that ends a first reading), then packing (what the model sees), logprobs (the
kernel), batches (pairs of token ids into the two), and attention (who sees whom, registered with transformers).
"""
