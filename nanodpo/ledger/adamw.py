"""Splits AdamW's updates over the gradients that made them, and says how heavier gradients would have changed them.

    m_k = b1 m_{k-1} + (1 - b1) g_k,    v_k = b2 v_{k-1} + (1 - b2) g_k^2,    d_k = sqrt(v_k / (1 - b2^t)) + eps
    update_k = - rate_k m_k / ((1 - b1^t) d_k) - rate_k decay w_k,             t = k + 1

g_k is the step's gradient after clipping: g_k = c_k G_k with c_k = min(1, max_norm / (|G_k| + 1e-6)).

Shares. Given its denominators d, an update is linear in all gradients up to it. A probe f, a function of the weights,
changes by sum_k <P_k, update_k>, P_k being the mean of its gradients before and after the update (the trapezoid rule).
So each part g of a step's gradient made <Q_j, g> of the change, and all of these with the weight decay's add up to it:

    Q_j = b1 Q_{j+1} + (1 - b1) q_j,    q_k = - rate_k P_k / ((1 - b1^t) d_k)

Effects. If a part of a step's gradient had weighed a little more, d and the clipping would have changed as well. The
derivative of f at the end by the logarithm of that weight, for gradients of later steps as they were, is <A_j, g>:

    A_j = Q'_j + 2 g_j R_j  minus its part along G_j where the step was clipped
    Q' is Q with P = grad f(end);   R_j = b2 R_{j+1} + (1 - b2) rate_j grad f(end) m_j / (2 (1 - b1^t) d_j^2 s_j)

with s_j = sqrt(v_j (1 - b2^t)). Shares tell what made the change; effects tell what one change would have done, to
first order. AdamW is why they differ: with all gradients twice as large it makes the same updates, so over all pairs
shares add up to the change of f, and effects to about 0, but where some steps were clipped and others not.

Shapes: D weights, M probes. Torch only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CLIP_EPSILON = 1e-6  # DeepSpeed's and torch's clip_grad_norm_
STATE = ("q", "q_end", "r")  # of an Adjoint, (M, D) each


class AdamW(NamedTuple):
    """The settings of a run's optimizer."""

    beta1: float
    beta2: float
    epsilon: float
    max_norm: float  # 0: never clipped
    decay: float

    def clip_factor(self, norm: float) -> float:
        """c_k, by which a gradient of this norm is multiplied."""
        return min(1.0, self.max_norm / (norm + CLIP_EPSILON)) if self.max_norm else 1.0


class Moments(NamedTuple):
    """After t updates: m and v, (D,) each."""

    m: Tensor
    v: Tensor
    t: int = 0

    def after(self, grad: Tensor, adam: AdamW) -> "Moments":
        """The moments after one more update with this gradient (D,), clipped."""
        return Moments(torch.lerp(self.m, grad, 1 - adam.beta1),
                       self.v * adam.beta2 + (1 - adam.beta2) * grad * grad, self.t + 1)

    def denominator(self, adam: AdamW) -> Tensor:
        """(1 - b1^t) d: (D,)."""
        d = (self.v / (1 - adam.beta2**self.t)).sqrt_().add_(adam.epsilon)
        return d.mul_(1 - adam.beta1**self.t)

    def update(self, rate: float, adam: AdamW, decayed: Tensor) -> Tensor:
        """(D,): what this update adds to the weights. `decayed`: (D,) weights before it, 0 where none decay."""
        return -rate * (self.m / self.denominator(adam) + adam.decay * decayed)


def lacking(before: Tensor, after: Tensor, update: Tensor, roundings: int) -> Tensor:
    """The part of the change from weights (D,) before to those after that this update does not explain, by its norm:
    as far as it is more than so many roundings of the weights to their precision can have made."""
    made, size = after - before, after.abs()
    half = (torch.nextafter(size, torch.full_like(size, torch.inf)) - size) / 2  # of the last digit
    return ((made - update).abs() - roundings * half).clamp_(min=0).norm() / made.norm()


class Adjoint:
    """Goes through a run from its last update to its first; at each, `share` and `effect` give what the parts of its
    gradient did to M probes."""

    def __init__(self, adam: AdamW, end: Tensor, state: dict[str, Tensor] | None = None):
        """`end`: (M, D), the gradients of the probes with respect to the weights after the last update.
        `state`: what `state` gave, to go on from there, in the same memory."""
        self.adam, self.end = adam, end
        self.q, self.q_end, self.r = ((state[name] if state else torch.zeros_like(end)) for name in STATE)

    def state(self) -> dict[str, Tensor]:
        """All that changes from step to step."""
        return dict(zip(STATE, (self.q, self.q_end, self.r)))

    def back(self, path: Tensor, rate: float, now: Moments) -> None:
        """Before the update that led to the moments `now`. `path`: (M, D), P of this update."""
        adam, slope = self.adam, -rate / now.denominator(self.adam)  # (D,)
        self.q.mul_(adam.beta1).addcmul_(path, slope, value=1 - adam.beta1)
        self.q_end.mul_(adam.beta1).addcmul_(self.end, slope, value=1 - adam.beta1)
        root = now.v.sqrt()
        d = root / (1 - adam.beta2**now.t) ** 0.5 + adam.epsilon
        # Where no gradient has come yet, m is 0 and so is its part in the update, whatever the denominator.
        bend = torch.where(root > 0, -slope * now.m / (2 * d * root * (1 - adam.beta2**now.t) ** 0.5), 0.0)
        self.r.mul_(adam.beta2).addcmul_(self.end, bend, value=1 - adam.beta2)

    def share(self, part: Tensor) -> Tensor:
        """(D,) -> (M,): what this part of the clipped gradient made of the probes' change."""
        return self.q @ part

    def heavier(self, grad: Tensor, clip: float) -> Tensor:
        """(M, D): A_j of a step whose gradient was `grad` after being multiplied by `clip`. <A_j, part> is the effect
        of a part of that gradient."""
        a = torch.addcmul(self.q_end, self.r, grad, value=2)
        if clip < 1:  # a heavier part makes all others of the step lighter
            norm = grad.norm() / clip
            along = grad / grad.norm()
            a.addr_(a @ along, along, alpha=-(norm / (norm + CLIP_EPSILON)).item())
        return a
