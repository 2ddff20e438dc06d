"""The loss that --loss names, one of core/losses.py or a function of your own, with its settings filled in."""

import functools
import hashlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..core.losses import INPUTS, LOSSES, inputs_of, needs_reference, pair_losses, settings_of
from ..errors import UserError, first_line
from ..files import parse_json, read_text, why
from .unknown import hint

TRL = {name: f"TRL's {name} is {ours} here" for name, ours in {
    "sigmoid": "dpo", "sigmoid_norm": "dpo_norm", "slic": "hinge", "rpo": "dpo", "nll": "sft"}.items()}
TRL |= dict.fromkeys("exo_pair nca_pair bco_pair sppo_hard apo_down discopop alphapo".split(),
                     "is not built in; a function of your own gives it (docs/losses.md)")
TRL |= dict.fromkeys("aot aot_unpaired kto".split(),
                     "is not built in, since its terms depend on other rows of the batch; a loss here has the "
                     "numbers of one pair alone")
SMOOTHED = sorted(name for name, loss in LOSSES.items() if "label_smoothing" in inspect.signature(loss).parameters)
OWN = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


def own_function(loss: str) -> tuple[str, str] | None:
    """(FILE.py, FUNCTION) where --loss names a function of the user's own."""
    found = OWN.fullmatch(loss)
    return found and (found["file"], found["function"])


def loss_name(loss: str) -> str:
    """A loss in one word: the name of its function."""
    return (own_function(loss) or (None, loss))[1]


def check_loss(args) -> None:
    """Raises UserError for a loss that is not there, or whose settings are not its own. Runs no code of the user's."""
    if args.loss in LOSSES:
        bind(LOSSES[args.loss], args)
    elif not own_function(args.loss):
        words = hint(args.loss, LOSSES, TRL, "")
        words = words if args.loss in TRL else "; ".join(["there is no such loss", *filter(None, [words])])
        end = "" if words.endswith("?") else "."
        raise UserError(f"--loss {args.loss}: {words}{end} There are "
                        f"{', '.join(LOSSES)}, and FILE.py:FUNCTION, a function of your own like those in "
                        "nanodpo/core/losses.py")


# What a function of the user's own may raise by mistake.
FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError)


def read_loss(args, beta_given: bool = False) -> tuple[Callable, str | None]:
    """(the loss as pair_losses takes it, the hash of the file that it was read from). Raises UserError, also for a
    --beta, where one was given, by which nothing is multiplied: neither the loss nor rewards among the metrics."""
    if not (own := own_function(args.loss)):
        return _tried(bind(LOSSES[args.loss], args), args), None
    spec = importlib.util.spec_from_file_location(Path(own[0]).stem, own[0])
    module = importlib.util.module_from_spec(spec)
    try:
        text = read_text(own[0])
        spec.loader.exec_module(module)  # the command line named it
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--loss {args.loss}: can't be read ({why(error)})") from error
    function = getattr(module, own[1], None)
    if not inspect.isfunction(function):
        raise UserError(f"--loss {args.loss}: {own[0]} has no function {own[1]}")
    if not {"chosen", "rejected"} <= inputs_of(function):
        raise UserError(f"--loss {args.loss}: takes no chosen and rejected; the parameters of a loss are named "
                        f"{', '.join(INPUTS)}, beta, label_smoothing, and what --loss_kwargs gives")
    if beta_given and "beta" not in inspect.signature(function).parameters and not needs_reference(function):
        raise UserError(f"--beta {args.beta} has no meaning for --loss {args.loss}; leave it out")
    return _tried(bind(function, args), args), hashlib.sha256(text.encode()).hexdigest()


def _tried(loss: Callable, args) -> Callable:
    """The loss, after a call with three pairs. Raises UserError for a value of a setting that it refuses by ValueError,
    for another error that it raises, and for a result that is not one finite number a pair, with a gradient, or in
    which other pairs take part."""
    try:
        logps = torch.full((3, 2), -2.0, requires_grad=True)
        found = pair_losses(loss, logps, torch.full((3, 2), -2.0), torch.ones(3, 2))
    except ValueError as error:
        raise UserError(f"--loss {args.loss}: {first_line(error)}") from error
    except FAULTS as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--loss {args.loss}: raises {type(error).__name__} for 3 pairs: {said}") from error
    if getattr(found, "shape", None) != (3,):
        shape = tuple(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise UserError(f"--loss {args.loss}: gives {shape} for 3 pairs; a loss gives one number for each, a tensor of "
                        "shape (3,)")
    if not found.requires_grad:
        raise UserError(f"--loss {args.loss}: its result has no gradient with respect to chosen and rejected; compute "
                        "it from these tensors alone, without detach, item or numpy")
    if not found.isfinite().all():
        settings = f" --loss_kwargs {args.loss_kwargs}" if args.loss_kwargs else ""
        raise UserError(f"--loss {args.loss}{settings}: gives {found[0].item()} for pairs whose policy is the "
                        "reference, where training starts")
    if not _is_of_each_pair(loss):
        raise UserError(f"--loss {args.loss}: gives a pair another loss beside other pairs than alone; a pair's loss "
                        "must depend on its own numbers alone, however steps are cut into micro-batches")
    return loss


def _is_of_each_pair(loss: Callable) -> bool:
    """Whether three pairs have the losses, and slopes of them, that each has by itself."""
    logps = torch.tensor([[-2.0, -3.0], [-1.0, -4.5], [-5.0, -2.5]], dtype=torch.float64)
    ref, lengths = logps.flip(0) - 0.25, torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 4.0]])

    def found(pairs: list[int]) -> torch.Tensor:
        own = logps[pairs].requires_grad_()
        losses = pair_losses(loss, own, ref[pairs], lengths[pairs])
        return torch.cat([losses.detach()[:, None], *torch.autograd.grad(losses.sum(), own)], 1)

    try:
        together, alone = found([0, 1, 2]), torch.cat([found([k]) for k in range(3)])
    except (*FAULTS, ValueError):
        return False
    return torch.allclose(together, alone, rtol=1e-5, atol=1e-9, equal_nan=True)


def bind(function: Callable, args) -> Callable:
    """The function with its settings filled in: --beta, --label_smoothing and --loss_kwargs. Raises UserError."""
    takes = {name: p for name, p in inspect.signature(function).parameters.items() if name not in INPUTS}
    given = _kwargs(args.loss_kwargs)
    own = settings_of(function)
    if odd := [name for name in given if name not in own]:
        raise UserError(f"--loss_kwargs {args.loss_kwargs}: {function.__name__} takes no {odd[0]}"
                        + (f"; it takes {', '.join(own)}" if own else ""))
    if args.label_smoothing and "label_smoothing" not in takes:
        raise UserError(f"--label_smoothing has no meaning for --loss {args.loss}; leave it out, or use "
                        f"{' or '.join(SMOOTHED)}")
    for flag, used in (("reference", needs_reference(function)), ("sft_weight", "rejected" in inputs_of(function))):
        if (value := getattr(args, flag)) and not used:
            raise UserError(f"--{flag} {value} has no meaning for --loss {args.loss}; leave it out")
    given |= {"beta": args.beta} if "beta" in takes else {}
    given |= {"label_smoothing": args.label_smoothing} if args.label_smoothing else {}  # else the function's default
    if missing := [name for name, p in takes.items() if name not in given and p.default is p.empty]:
        known = [*INPUTS, "beta", "label_smoothing"]
        words = hint(missing[0], known, dashes="")
        raise UserError(f"--loss {args.loss}: takes {missing[0]}, which has no default, and is no input of a loss "
                        f"({', '.join(known)}){'; ' * bool(words)}{words}; give a setting with --loss_kwargs")
    return functools.partial(function, **given)


def _kwargs(text: str | None) -> dict[str, float]:
    """The value of --loss_kwargs. Raises UserError for what is no JSON object of numbers."""
    try:
        found = parse_json(text or "{}")
        if not isinstance(found, dict) or not all(type(v) in (int, float) and math.isfinite(v) for v in found.values()):
            raise ValueError("is no object of numbers")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--loss_kwargs {text}: must be a JSON object of numbers, as '{{\"simpo_gamma\": 1.0}}' "
                        f"({error})") from error
    return found
