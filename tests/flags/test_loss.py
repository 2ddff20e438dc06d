"""--loss: one of the house's, or a function of the user's own, with its settings."""

import json
import math

import pytest
import torch
from conftest import ROOT

from nanodpo.core.losses import LOSSES, pair_losses
from nanodpo.errors import UserError
from nanodpo.flags.arguments import parse
from nanodpo.flags.loss import loss_name, read_loss
from nanodpo.run import start

LOGPS, REF = torch.tensor([[-1.0, -16.0]]), torch.tensor([[-3.0, -8.0]])
LENGTHS = torch.tensor([[4.0, 2.0]])


def args_of(*flags):
    return parse(["--model_name", "M", "--train_file_path", "D", *flags], None)


def loss_of(*flags) -> float:
    args = args_of(*flags)
    return pair_losses(read_loss(args)[0], LOGPS, REF, LENGTHS, args.sft_weight).item()


def test_settings_are_filled_in():
    """--beta, --label_smoothing, --loss_kwargs and --sft_weight, on a margin of 10 nats."""
    assert loss_of("--beta", "0.2") == pytest.approx(math.log1p(math.exp(-2)))
    assert loss_of("--label_smoothing", "0.25") == pytest.approx(
        0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1)))
    shifted = ("--loss", "shift", "--loss_kwargs", '{"shift_lambda": 0.5}')
    assert loss_of(*shifted) == pytest.approx(math.log1p(math.exp(-0.6)))
    assert loss_of(*shifted, "--sft_weight", "0.2") == pytest.approx(math.log1p(math.exp(-0.6)) + 0.05)


@pytest.fixture
def own(tmp_path):
    """A file with a loss, which is squared-hinge DPO with a length bonus, and with functions that are none."""
    file = tmp_path / "my losses.py"
    file.write_text("""import torch

def mine(chosen, rejected, ref_chosen, ref_rejected, lengths, beta, power=2.0):
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.relu(1 - beta * margin) ** power + 0.01 * lengths[:, 0]

def no_sides(chosen, beta): return -chosen
def mean(chosen, rejected): return (rejected - chosen).mean()
def nothing(chosen, rejected): pass
def asks(chosen, rejected, strength): return strength * (rejected - chosen)
def smoothed(chosen, rejected, label_smoothing=0.125): return label_smoothing * (rejected - chosen)

def refuses(chosen, rejected, limit=0.0):
    if limit <= 0:
        raise ValueError("limit must be above 0")
    return rejected - chosen

def still(chosen, rejected): return (rejected - chosen).detach()
def fails(chosen, rejected): return chosen / [][3]
def root(chosen, rejected): return (chosen + rejected).sqrt()
def centred(chosen, rejected): return (rejected - chosen) - (rejected - chosen).mean() / 2
def scaled(chosen, rejected): return (rejected - chosen) * (1 + rejected.detach() - rejected.detach().mean())
def squeezed(chosen, rejected): return (rejected - chosen).squeeze()
def misspelt(chosen, rejected, refchosen): return rejected - chosen + refchosen

NUMBER = 3
""")
    return file


def test_a_function_of_the_users_own(own):
    """The same signature as the house's; its own settings through --loss_kwargs; its name is the function's."""
    assert loss_of("--loss", f"{own}:mine") == pytest.approx(0.04)
    assert loss_of("--loss", f"{own}:mine", "--beta", "0.05") == pytest.approx(0.25 + 0.04)
    assert loss_of("--loss", f"{own}:mine", "--beta", "0.05", "--loss_kwargs", '{"power": 1}') == pytest.approx(0.54)
    assert loss_of("--loss", f"{own}:asks", "--loss_kwargs", '{"strength": 2}') == pytest.approx(-30.0)
    assert loss_of("--loss", f"{own}:smoothed") == -15 / 8  # its own default, unless the flag is given
    assert loss_of("--loss", f"{own}:smoothed", "--label_smoothing", "0.25") == -15 / 4
    assert loss_name(f"{own}:mine") == "mine" and loss_name("dpo") == "dpo"


def test_beta_without_a_use(own):
    """Of a loss with a reference it scales the rewards among the metrics; of a run that is scored it is recorded."""
    own.write_text("def mine(chosen, rejected, ref_chosen): return rejected - chosen + ref_chosen\n"
                   "def free(chosen, rejected): return rejected - chosen\n")
    assert read_loss(args_of("--loss", f"{own}:mine", "--beta", "0.3"), beta_given=True)
    assert read_loss(args_of("--loss", f"{own}:free", "--beta", "0.3"))
    with pytest.raises(UserError, match="--beta 0.3 has no meaning for --loss .*:free; leave it out"):
        start.prepare(["--model_name", "M", "--train_file_path", "D", "--loss", f"{own}:free", "--beta", "0.3"],
                      ROOT / "train.py")


def test_the_hash_is_of_the_file(own):
    """So that a run does not go on with a function that has changed; a loss of the house has none."""
    before = read_loss(args_of("--loss", f"{own}:mine"))[1]
    own.write_text(own.read_text().replace("0.01", "0.02"))
    assert len(before) == 64 and before != read_loss(args_of("--loss", f"{own}:mine"))[1]
    assert read_loss(args_of())[1] is None


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_house_can_be_named(name):
    assert read_loss(args_of("--loss", name))[0].func is LOSSES[name]


@pytest.mark.parametrize("flags, words", [
    (["--loss", "dpo_nrm"], "--loss dpo_nrm: there is no such loss; did you mean dpo_norm? There are dpo, ipo"),
    (["--loss", "sigmoid_norm"], "TRL's sigmoid_norm is dpo_norm here"), (["--loss", "nll"], "TRL's nll is sft here"),
    (["--loss", "kto"], "--loss kto: is not built in, since its terms depend on other rows of the batch; a loss here "
     "has the numbers of one pair alone. There are dpo, ipo"),
    (["--loss", "grpo"], "--loss grpo: there is no such loss. There are dpo, ipo"),
    (["--loss", "@no.py:mine"], "no.py:mine: can't be read (No such file or directory)"),
    (["--loss", "@my losses.py:other"], "has no function other"),
    (["--loss", "@my losses.py:NUMBER"], "has no function NUMBER"),
    (["--loss", "@my losses.py:no_sides"], "takes no chosen and rejected"),
    (["--loss", "@my losses.py:mean"], "gives () for 3 pairs"),
    (["--loss", "@my losses.py:nothing"], "gives NoneType for 3 pairs"),
    (["--loss", "@my losses.py:still"], "its result has no gradient with respect to chosen and rejected"),
    (["--loss", "@my losses.py:fails"], "raises IndexError for 3 pairs: list index out of range"),
    (["--loss", "@my losses.py:centred"], "centred: gives a pair another loss beside other pairs than alone"),
    (["--loss", "@my losses.py:scaled"], "scaled: gives a pair another loss beside other pairs than alone"),
    (["--loss", "@my losses.py:squeezed"], "squeezed: gives a pair another loss beside other pairs than alone"),
    (["--loss", "@my losses.py:asks"], "takes strength, which has no default, and is no input of a loss (chosen"),
    (["--loss", "@my losses.py:misspelt"], "label_smoothing); did you mean ref_chosen?; give a setting with"),
    (["--loss", "@my losses.py:refuses"], "my losses.py:refuses: limit must be above 0"),
    (["--loss", "@my losses.py:root"], "my losses.py:root: gives nan for pairs whose policy is the reference"),
    (["--loss", "bounded", "--loss_kwargs", '{"bounded_lambda": 2}'],
     "--loss bounded: bounded_lambda 2: must be above 0, and at most 1"),
    (["--loss", "dpop", "--loss_kwargs", '{"dpop_lambda": 1e308}', "--beta", "1e308"],
     '--loss dpop --loss_kwargs {"dpop_lambda": 1e308}: gives nan for pairs whose policy is the reference'),
    (["--loss_kwargs", '{"gamma": 1}'], "dpo takes no gamma"),
    (["--loss", "simpo", "--loss_kwargs", '{"gamma": 1}'], "simpo takes no gamma; it takes simpo_gamma"),
    (["--loss", "simpo", "--loss_kwargs", '{"simpo_gamma": "1"}'], "must be a JSON object of numbers"),
    (["--loss", "simpo", "--loss_kwargs", '{"simpo_gamma": NaN}'], "must be a JSON object of numbers"),
    (["--loss", "simpo", "--loss_kwargs", "0.5"], "must be a JSON object of numbers"),
    (["--loss", "simpo", "--loss_kwargs", '{"simpo_gamma": 1, "simpo_gamma": 2}'], "has 'simpo_gamma' twice"),
    (["--loss", "simpo", "--reference", "M"], "--reference M has no meaning for --loss simpo"),
    (["--loss", "sft", "--sft_weight", "0.5"], "--sft_weight 0.5 has no meaning for --loss sft"),
    (["--loss", "sft", "--beta", "0.3"], "--beta 0.3 has no meaning for --loss sft"),
    (["--loss", "@my losses.py:smoothed", "--beta", "0.3"], "my losses.py:smoothed; leave it out"),
    (["--train_on", "last"], "--train_on last has no meaning for --loss dpo"),
    (["--sft_weight", "-1"], "--sft_weight -1.0: must not be negative"),
    (["--loss", "gate", "--label_smoothing", "0.1"], "no meaning for --loss gate; leave it out, or use dpo or "),
])
def test_wrong_input(own, flags, words):
    """One line that names the flag, what was found and what would do."""
    with pytest.raises(UserError) as caught:
        read_loss(args_of(*(flag.replace("@", f"{own.parent}/") for flag in flags)), "--beta" in flags)
    assert words in str(caught.value)


@pytest.mark.parametrize("loss", "exo_pair nca_pair bco_pair sppo_hard apo_down discopop".split())
def test_a_loss_of_trl_that_is_not_here_is_sent_to_a_function_of_ones_own(loss):
    """Each of these is a function of one pair's numbers, which --loss FILE.py:FUNCTION takes."""
    with pytest.raises(UserError, match=rf"^--loss {loss}: is not built in; a function of your own gives it \(docs/"):
        args_of("--loss", loss)


def test_a_file_that_is_no_python(tmp_path):
    (tmp_path / "x.py").write_text("def mine(chosen, rejected:\n")
    with pytest.raises(UserError, match="x.py:mine: can't be read"):
        read_loss(args_of("--loss", f"{tmp_path}/x.py:mine"))


def test_a_record_runs_no_code(tmp_path):
    """score.py asks a record for its loss's name alone: nothing is imported that somebody else's run.json names."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({json.dumps(str(tmp_path / 'ran'))}, 'w')\ndef mine(chosen, rejected): return chosen\n")
    args = args_of("--loss", f"{trap}:mine")
    assert loss_name(args.loss) == "mine" and not (tmp_path / "ran").exists()
    read_loss(args)
    assert (tmp_path / "ran").exists()
