"""The losses that TRL has too, against TRL's own code on the same log-probs. Needs `pip install trl==1.16.0`."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from nanodpo.core.losses import (
    apo_zero,
    cpo,
    dpo,
    dpo_norm,
    hinge,
    ipo,
    orpo,
    pair_losses,
    rewards_without_reference,
    robust,
    sft,
    simpo,
)

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")

LENGTHS = torch.tensor([[4, 7], [9, 2], [1, 12]])
LOGPS = torch.tensor([[-5.0, -13.5], [-20.25, -1.0], [-0.5, -40.0]])
REF = torch.tensor([[-6.0, -11.0], [-16.0, -2.5], [-3.0, -20.0]])


def trl_dpo(loss_type: str, beta: float, label_smoothing: float) -> float:
    """DPOTrainer's own loss of a batch whose model gives these log-probs, each response's spread evenly over tokens."""
    longest = 1 + LENGTHS.max().item()  # the first token is the prompt
    lengths, sums = LENGTHS.T.reshape(-1, 1), LOGPS.T.reshape(-1, 1)
    mask = (torch.arange(1, longest) <= lengths).long()
    per_token = mask * sums / lengths
    trainer = MagicMock()
    trainer.__class__ = trl.DPOTrainer
    values = {"beta": beta, "label_smoothing": label_smoothing, "loss_types": [loss_type], "loss_weights": [1.0],
              "f_divergence_type": "reverse_kl", "ld_alpha": None, "precompute_ref_logps": True, "use_weighting": False,
              "aux_loss_enabled": False, "f_alpha_divergence_coef": 0.5}
    for name, value in values.items():
        setattr(trainer, name, value)
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics.side_effect = trainer.accelerator.gather.side_effect = lambda x: x
    outputs = SimpleNamespace(log_probs=per_token, entropy=per_token, mean_logits=per_token, is_top1=mask.bool())
    inputs = {"input_ids": torch.zeros(6, longest, dtype=torch.long), "attention_mask": torch.ones(6, longest),
              "completion_mask": torch.cat([torch.zeros(6, 1, dtype=torch.long), mask], 1),
              "ref_chosen_logps": REF[:, 0], "ref_rejected_logps": REF[:, 1]}
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()


@pytest.mark.parametrize("ours, theirs, smoothing", [
    (dpo, "sigmoid", 0.0), (hinge, "hinge", 0.0), (ipo, "ipo", 0.0), (robust, "robust", 0.2),
    (dpo_norm, "sigmoid_norm", 0.0), (apo_zero, "apo_zero", 0.0)])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_trainer(ours, theirs, smoothing, beta):
    loss = partial(ours, beta=beta, **({"label_smoothing": smoothing} if smoothing else {}))
    found = pair_losses(loss, LOGPS.double(), REF.double(), LENGTHS.double()).mean().item()
    assert found == pytest.approx(trl_dpo(theirs, beta, smoothing), rel=1e-6)


def test_sft():
    """TRL's is a mean over the tokens of the batch."""
    found = pair_losses(sft, LOGPS, None, LENGTHS).sum().item() / LENGTHS[:, 0].sum().item()
    assert found == pytest.approx(trl_dpo("sft", 0.1, 0.0), rel=1e-6)


def same_as_trl(loss, beta, losses, chosen, rejected):
    """Loss and rewards of these pairs, without a reference."""
    ours = pair_losses(loss, LOGPS.double(), None, LENGTHS.double())
    assert ours.tolist() == pytest.approx(losses.tolist(), rel=1e-6)
    rewards = rewards_without_reference(loss, LOGPS.double(), LENGTHS.double(), beta)
    assert rewards[:, 0].tolist() == pytest.approx(chosen.tolist(), rel=1e-6)
    assert rewards[:, 1].tolist() == pytest.approx(rejected.tolist(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_simpo_and_cpo(beta):
    """TRL's cpo_loss is the preference part; its likelihood term is a mean over tokens of chosen, times cpo_alpha."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(beta=beta, simpo_gamma=0.7, label_smoothing=0.0, alpha=0.0,
                              accelerator=SimpleNamespace(device="cpu"))
    means = (LOGPS / LENGTHS).double()
    same_as_trl(partial(simpo, beta=beta, simpo_gamma=0.7), beta,
                *CPOTrainer.cpo_loss(SimpleNamespace(**vars(trainer), loss_type="simpo"), *means.T))
    same_as_trl(partial(cpo, beta=beta, cpo_alpha=0.0), beta,
                *CPOTrainer.cpo_loss(SimpleNamespace(**vars(trainer), loss_type="sigmoid"), *LOGPS.double().T))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_orpo(beta):
    """TRL's odds_ratio_loss is beta log sigmoid(log odds ratio), which its trainer takes off the likelihood's loss."""
    from trl.experimental.orpo import ORPOTrainer

    means = (LOGPS / LENGTHS).double()
    trainer = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    ratio, *rewards = ORPOTrainer.odds_ratio_loss(trainer, *means.T)[:3]
    same_as_trl(partial(orpo, beta=beta), beta, -means[:, 0] - ratio, *rewards)
