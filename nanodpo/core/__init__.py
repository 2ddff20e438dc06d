"""The lesson, in torch alone: from token ids to log-probabilities, and from those to a loss.

Read losses, then logprobs (the kernel), packing (what the model sees), attention (who sees whom), and step, which joins
them.
"""
