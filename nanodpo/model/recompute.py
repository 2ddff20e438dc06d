"""Chooses, for each batch, the layers that backward computes again instead of keeping their activations.

The choice changes memory and time (bench/README.md), but no bit of a number. So each batch gets the fastest choice that
fits. Slow to import, with PEFT.
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
from ..ranks.distributed import gather_or_raise

# From the fastest to the one that needs the least memory. "full" keeps only the layer's input, "offload" in the CPU's
# memory.
MODES = ("keep", "full", "offload")


class Recompute:
    """Sets one of MODES for each layer of a model, by transformers' switch for gradient checkpointing."""

    def __init__(self, model: nn.Module, zero_stage: int = 0):
        """Raises UserError where the model has no such layers."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not (self.layers and inner.supports_gradient_checkpointing):
            raise UserError(f"{type(inner).__name__} can't compute its layers again in backward. Leave out "
                            "--gradient_checkpointing and --activation_memory")
        # ZeRO-3 frees weights between forward and backward, for which the newer, hook-based checkpointing raises an
        # error. The older one runs backward only where the inputs have a gradient.
        self.functions = {"full": functools.partial(checkpoint, use_reentrant=zero_stage == 3),
                          "offload": _offloaded}
        if zero_stage == 3:
            inner.enable_input_require_grads()

    def use(self, *modes: str) -> None:
        """Sets a mode for each layer, or one for all, from the next batch on. Batches before must have had their
        backward pass."""
        for layer, mode in zip(self.layers, modes * len(self.layers) if len(modes) == 1 else modes, strict=True):
            layer.gradient_checkpointing = mode != "keep"
            layer._gradient_checkpointing_func = self.functions.get(mode)
            for module in layer.modules():
                if hasattr(module, "keeps_less"):  # its hooks would keep what those of `checkpoint` drop
                    module.keeps_less = mode == "keep"


class FitToMemory:
    """Sets the modes for each batch by its number of tokens: as much is kept as the memory for activations allows."""

    def __init__(self, recompute: Recompute, module: nn.Module, sample_batch, budget: float):
        """`sample_batch(tokens)` makes a batch to measure with. `budget`: bytes for the forward and backward pass of a
        batch's layers, without the head's and the weights' gradients, which do not grow with the batch."""
        self.recompute, self.per_token = recompute, {}  # bytes
        short, long = sample_batch(256), sample_batch(512)
        for mode in MODES if long.input_ids.is_cuda else MODES[:2]:  # a CPU has nowhere to offload to
            recompute.use(mode)
            more = long.input_ids.numel() - short.input_ids.numel()
            # A difference, since memory that does not grow with the batch is not the batch's.
            self.per_token[mode] = (peak_bytes(module, long) - peak_bytes(module, short)) / more
        # All ranks take the same modes: those that share a batch exchange states within its layers, also when they are
        # computed again.
        everyone = gather_or_raise(None, (budget, self.per_token))
        self.budget = min(budget for budget, _ in everyone)
        self.per_token = {mode: max(each[mode] for _, each in everyone) for mode in self.per_token}
        self.limits = {mode: int(self.budget / size) for mode, size in self.per_token.items()}  # tokens of a batch

    def __call__(self, tokens: int) -> list[str]:
        """Sets and returns the modes, by layer, of a batch of so many tokens. One that does not fit gets the last mode
        for all layers, and may run out of memory."""
        modes = self.modes(tokens)
        self.recompute.use(*modes)
        return modes

    def before_forward(self, module, arguments) -> None:
        """A forward pre-hook of the module: sets the modes for a batch that is trained on."""
        if torch.is_grad_enabled():
            (batch,) = arguments
            self(batch.input_ids.numel())

    def modes(self, tokens: int) -> list[str]:
        """The modes, by layer: two neighbours in MODES share the layers. The one that needs less memory gets the first
        layers: backward comes to them last, when the others' activations are freed."""
        layers, modes = len(self.recompute.layers), [*self.per_token.items()]
        budget = self.budget / tokens  # bytes a token
        for (fast, most), (lean, least) in zip(modes, modes[1:]):
            if budget >= most:
                return [fast] * layers
            if budget >= least:
                count = math.ceil(layers * (most - budget) / (most - least))
                return [lean] * count + [fast] * (layers - count)
        return [modes[-1][0]] * layers

    def __str__(self) -> str:
        longest = ", ".join(f"{mode} {limit:,}" for mode, limit in self.limits.items())
        return f"longest batches in tokens: {longest}; between these by layer"


def sample_batch(layout: str, config, device, tokens: int):
    """A batch of about so many tokens to measure with: two responses to a prompt, again where the model's context is
    shorter than that."""
    text = config.get_text_config()
    size = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
    prompt = max(1, size // 16)
    ids = torch.arange(size).remainder(text.vocab_size).tolist()
    sides = [ids[prompt : (size + prompt) // 2], ids[(size + prompt) // 2 :]]
    return LAYOUTS[layout]([(ids[:prompt], sides)] * math.ceil(tokens / size)).to(device)


def peak_bytes(module: nn.Module, batch) -> int:
    """The most bytes that tensors made in module.states(batch) and its backward pass take at one time.

    Without the head: its chunks may need more than the layers of a short batch, and would hide how these grow. The
    backward pass ends at a small weight of the first layer.
    """
    first = min(itertools.islice((p for p in module.parameters() if p.requires_grad), 12), key=torch.Tensor.numel)
    was_training = module.training
    module.train()
    try:
        with torch.enable_grad(), _Live(batch.input_ids.device) as live:
            torch.autograd.grad(module.states(batch).sum(), first)
        return live.peak
    finally:
        module.train(was_training)


class _Live(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make on this type of device, while they live."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak, self.total = device.type, {}, 0, 0  # live: {StorageWeakRef: bytes}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = dict(self._storages((args, kwargs)))
        result = op(*args, **(kwargs or {}))
        # The result of an operation may be a view of an argument.
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
