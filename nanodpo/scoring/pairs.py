"""Measures a pair: how alike the model finds its two responses, and what training on it would do."""

import torch
from torch import Tensor


def ches(chosen: Tensor, rejected: Tensor, n_chosen: int, n_rejected: int) -> tuple[float, float]:
    """(D,) sums of the states that predict each response's tokens -> CHES and its length-normalised form.

    CHES = <sum h+, sum h-> - |sum h+|^2; normalised: <., .> / (n+ n-) - |.|^2 / n+^2, with the true lengths in tokens.
    The larger, the more a step on the pair lowers the chosen response too (arXiv 2410.08847, Definition 2 and its
    length-normalised form).
    """
    inner, own = (chosen @ rejected).item(), (chosen @ chosen).item()
    return inner - own, inner / (n_chosen * n_rejected) - own / n_chosen**2


def gradient_products(logps: Tensor, parameters: list[Tensor], sum_over=lambda part: part) -> dict[str, float]:
    """(2,) log-probs of chosen and rejected -> inner product, cosine and norms of their gradients w.r.t. `parameters`.
    `sum_over`: the `sum` of OneRank, for ranks that share the batch and have a part of each gradient.

    A small step along g(chosen) - g(rejected), dpo's direction, raises chosen where <g(chosen), g(rejected)> is below
    |g(chosen)|^2, and lowers rejected where it is below |g(rejected)|^2 (arXiv 2410.13828). The cosine is NaN where a
    gradient is zero.
    """
    grads = [torch.autograd.grad(logp, parameters, retain_graph=i == 0, materialize_grads=True)
             for i, logp in enumerate(logps)]
    grads = [[sum_over(grad) for grad in side] for side in grads]
    dot = sum((a.double() * b.double()).sum() for a, b in zip(*grads)).item()
    norms = [sum(g.double().square().sum() for g in side).sqrt().item() for side in grads]
    return {"grad_dot": dot, "grad_cosine": dot / (norms[0] * norms[1]) if all(norms) else float("nan"),
            "grad_norm_chosen": norms[0], "grad_norm_rejected": norms[1]}
