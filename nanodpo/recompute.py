"""What backward computes again instead of keeping: nothing, the cheap part of each layer, or all of it.

The numbers are the same to the last bit in all three; memory and time are not (bench/README.md). So each row may have
its own: the fastest that fits. Slow to import, with PEFT.
"""

import functools

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .errors import UserError
from .lora import Added

MODES = ("keep", "selective", "full")  # from the fastest to the smallest

# Products of matrices, and which argument of each holds the hidden states.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1,
            "aten::_grouped_mm": 0, "transformers::grouped_mm_fallback": 0}  # of experts


class Recompute:
    """One of MODES for a model's layers, through the switch that transformers has put into each."""

    def __init__(self, model: nn.Module, rank: int, zero_stage: int = 0):
        """`rank` is LoRA's, 0 without. Raises UserError where the model has no such layers."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.layers = [module for module in inner.modules() if hasattr(module, "gradient_checkpointing")]
        self.added = [module for module in inner.modules() if isinstance(module, Added)]
        if not (self.layers and inner.supports_gradient_checkpointing):
            raise UserError(f"{type(inner).__name__} can't compute its layers again in backward. Leave out "
                            "--gradient_checkpointing, --selective_checkpointing and --activation_memory")
        self.depth = inner.config.get_text_config().num_hidden_layers
        keep = functools.partial(_keep, rank=rank)
        contexts = functools.partial(create_selective_checkpoint_contexts, keep)
        # ZeRO-3 frees weights between forward and backward, which the newer, hook-based checkpointing takes for an
        # error; the older one runs backward only where the inputs have a gradient.
        self.functions = {"full": functools.partial(checkpoint, use_reentrant=zero_stage == 3),
                          "selective": functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)}
        self.in_place = zero_stage < 3
        if zero_stage == 3:
            inner.enable_input_require_grads()

    def use(self, mode: str) -> None:
        """For every row from now on. Rows before must have had their backward pass."""
        for layer in self.layers:
            layer.gradient_checkpointing = mode != "keep"
            layer._gradient_checkpointing_func = self.functions.get(mode)
        for added in self.added:  # what selective keeps must stay what it was
            added.in_place = self.in_place and mode != "selective"


class ByNeed:
    """Called with the tokens of each row before its forward pass: lets it keep as much as its memory allows."""

    def __init__(self, recompute: Recompute, module: nn.Module, row, room: float):
        """`row` is a sample to measure with; `room`: bytes for what a row keeps, and for its backward pass."""
        self.recompute, self.kept = recompute, {}  # bytes a token
        for mode in MODES:
            recompute.use(mode)
            self.kept[mode] = kept_bytes(module, row) / row.input_ids.numel()
        # What one layer keeps is there again while its gradients are made, and these are about as large.
        passing = 2 * self.kept["keep"] / recompute.depth
        self.limits = {mode: int(room / (kept + passing)) for mode, kept in self.kept.items()}  # tokens

    def __call__(self, tokens: int) -> str:
        """The mode, set and returned. A row that does not fit at all gets the smallest, and may yet fail."""
        mode = next((mode for mode in MODES if tokens <= self.limits[mode]), MODES[-1])
        self.recompute.use(mode)
        return mode


def kept_bytes(module: nn.Module, row) -> int:
    """Bytes of all tensors that are still there after module(row) and were made in it: what backward waits for."""
    was_training = module.training
    module.train()
    try:
        with torch.enable_grad(), _Made() as made:
            result = module(row)
        left = sum(size for storage, size in made.storages.items() if not storage.expired())
        del result  # which held it
        return left
    finally:
        module.train(was_training)


class _Made(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation makes, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}  # bytes; 0 of what was there, which may come back as a view

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self._see((args, kwargs), there=True)
        result = op(*args, **(kwargs or {}))
        self._see(result, there=False)
        return result

    def _see(self, tree, there: bool) -> None:
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)):
            self.storages.setdefault(StorageWeakRef(storage), 0 if there else storage.nbytes())


def _keep(context, op, *args, rank: int, **kwargs) -> CheckpointPolicy:
    """Keeps attention and large products; norms, activations and what LoRA adds to a product cost little.

    LoRA's second product sums over no more than its rank, and is as large as the one it is added to.
    """
    name = op.name().partition(".")[0]
    large = name in PRODUCTS and args[PRODUCTS[name]].shape[-1] > rank
    if large or "attention" in name or "attn" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
