"""Chooses, row by row, the layers that backward computes again instead of keeping their activations.

The numbers are the same to the last bit whichever they are; memory and time are not (bench/README.md). So each row may
have its own: the fastest choice that fits. Slow to import, with PEFT.
"""

import functools
import itertools
import math

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.packing import LAYOUTS
from ..errors import UserError

# From the fastest to the leanest. Offload is full, with the layers' inputs waiting in the CPU's memory.
MODES = ("keep", "full", "offload")


class Recompute:
    """One of MODES for each of a model's layers, through the switch that transformers has put into them."""

    def __init__(self, model: nn.Module, zero_stage: int = 0):
        """Raises UserError where the model has no such layers."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not (self.layers and inner.supports_gradient_checkpointing):
            raise UserError(f"{type(inner).__name__} can't compute its layers again in backward. Leave out "
                            "--gradient_checkpointing and --activation_memory")
        # ZeRO-3 frees weights between forward and backward, which the newer, hook-based checkpointing takes for an
        # error; the older one runs backward only where the inputs have a gradient.
        self.functions = {"full": functools.partial(checkpoint, use_reentrant=zero_stage == 3),
                          "offload": _offloaded}
        if zero_stage == 3:
            inner.enable_input_require_grads()

    def use(self, *modes: str) -> None:
        """For every row from now on, a mode for each layer or one for all. Rows before must have had their backward."""
        for layer, mode in zip(self.layers, modes * len(self.layers) if len(modes) == 1 else modes, strict=True):
            layer.gradient_checkpointing = mode != "keep"
            layer._gradient_checkpointing_func = self.functions.get(mode)
            for module in layer.modules():
                if hasattr(module, "keeps_less"):  # its hooks would keep what checkpoint's throw away
                    module.keeps_less = mode == "keep"


class ByNeed:
    """Called with the tokens of each row before its forward pass: lets it keep as much as its memory allows."""

    def __init__(self, recompute: Recompute, module: nn.Module, sample, room: float):
        """`sample(tokens)` makes a row to measure with; `room`: bytes for the forward and backward pass of a row's
        layers. The head's and the weights' gradients are not counted: they do not grow with it."""
        self.recompute, self.room, self.per_token = recompute, room, {}  # bytes
        short, long = sample(256), sample(512)
        for mode in MODES if long.input_ids.is_cuda else MODES[:2]:  # a CPU has nowhere to offload to
            recompute.use(mode)
            more = long.input_ids.numel() - short.input_ids.numel()
            # The difference: what does not grow with a row is not its own.
            self.per_token[mode] = (peak_bytes(module, long) - peak_bytes(module, short)) / more
        self.limits = {mode: int(room / size) for mode, size in self.per_token.items()}  # tokens of a row

    def __call__(self, tokens: int) -> list[str]:
        """The modes, by layer, set and returned. A row that does not fit at all gets the leanest, and may yet fail."""
        modes = self.modes(tokens)
        self.recompute.use(*modes)
        return modes

    def before_forward(self, module, arguments) -> None:
        """A hook of the module: a batch that is trained on gets the modes that it needs."""
        if torch.is_grad_enabled():
            (batch,) = arguments
            self(batch.input_ids.numel())

    def modes(self, tokens: int) -> list[str]:
        """Two neighbouring modes share the layers. The leaner has the first ones: backward comes to them last, when
        the others have let go of theirs."""
        layers, room, modes = len(self.recompute.layers), self.room / tokens, [*self.per_token.items()]
        for (rich, most), (lean, least) in zip(modes, modes[1:]):
            if room >= most:
                return [rich] * layers
            if room >= least:
                count = math.ceil(layers * (most - room) / (most - least))
                return [lean] * count + [rich] * (layers - count)
        return [modes[-1][0]] * layers

    def __str__(self) -> str:
        rows = ", ".join(f"{mode} {limit:,}" for mode, limit in self.limits.items())
        return f"longest rows in tokens: {rows}; between these by layer"


def sample(layout: str, config, device, tokens: int):
    """A row of about so many tokens to measure with: two responses to a prompt."""
    prompt = tokens // 16
    ids = torch.arange(tokens).remainder(config.get_text_config().vocab_size).tolist()
    sides = [ids[prompt : (tokens + prompt) // 2], ids[(tokens + prompt) // 2 :]]
    return LAYOUTS[layout]([(ids[:prompt], sides)]).to(device)


def peak_bytes(module: nn.Module, row) -> int:
    """The most bytes that tensors made in module.states(row) and its backward pass take at one time.

    Without the head: where its chunks outweigh a short row's layers, they would hide how these grow. The backward pass
    ends at a small weight of the first layer.
    """
    first = min(itertools.islice((p for p in module.parameters() if p.requires_grad), 12), key=torch.Tensor.numel)
    was_training = module.training
    module.train()
    try:
        with torch.enable_grad(), _Live(row.input_ids.device) as live:
            torch.autograd.grad(module.states(row).sum(), first)
        return live.peak
    finally:
        module.train(was_training)


class _Live(TorchDispatchMode):
    """Adds up the storages that operations make on this kind of device, for as long as they live."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak, self.total = device.type, {}, 0, 0  # live: {StorageWeakRef: bytes}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = dict(self._storages((args, kwargs)))
        result = op(*args, **(kwargs or {}))
        # What an operation gives back may be a view of what it was given.
        made = {storage: size for storage, size in self._storages(result) if storage not in given}
        self.live |= made
        self.total += sum(made.values())
        if self.total > self.peak:  # perhaps; some may be gone
            self.live = {storage: size for storage, size in self.live.items() if not storage.expired()}
            self.total = sum(self.live.values())
            self.peak = max(self.peak, self.total)
        return result

    def _storages(self, tree):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device:
                yield StorageWeakRef(leaf.untyped_storage()), leaf.untyped_storage().nbytes()


def _offloaded(function, *args):
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, use_reentrant=False)
