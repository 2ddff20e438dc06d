"""Opens checkpoints, one at a time: a base is loaded once, and the adapters on it take turns. And the device for it."""

import dataclasses
import gc
import os
from pathlib import Path

import torch
from torch import nn

from ..core.logprobs import OneRank, SequenceLogProbs
from ..folder.elastic import arguments_of
from ..model.adapters import adapter_shape, adapter_weights, add_adapter, exchange_adapter, open_base
from ..model.loading import base_hashes, check_base, check_reference, turn_off_dropout, weights_hash
from ..model.precision import storage_dtype
from ..model.quantised import bits_of
from ..model.ready import freeze
from ..model.source import base_of
from ..ranks import distributed, gpu
from .runs import Checkpoint, runs_against


@dataclasses.dataclass
class Opened:
    """A checkpoint, ready to be scored."""

    checkpoint: Checkpoint
    made_of: tuple[str, dict | None, bool, int | None]  # the base, the shape of its adapter, bf16, bits
    module: SequenceLogProbs
    layout: str
    own: str  # the model's own attention, which can generate
    trained: list[nn.Parameter]  # LoRA weights, where gradients are wanted
    recompute: bool  # backward computes the layers again

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def model(self) -> nn.Module:
        """The transformers model, with the adapter inside."""
        model = self.module.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def logps(self, batch) -> torch.Tensor:
        """(S,) log pi(y|x), nats, with the graph for a backward pass. The model is in eval mode again afterwards."""
        self.module.train(self.recompute)  # transformers keeps all in eval mode; without dropout both are alike
        try:
            return self.module(batch)
        finally:
            self.module.eval()


class StepZero(nn.Module):
    """A LoRA run's step 0 on the base of another checkpoint, whose adapter its own takes the place of in each pass."""

    def __init__(self, module: SequenceLogProbs, adapter: list[nn.Parameter], start: list[torch.Tensor]):
        """`start`: the values of step 0 of these parameters of the module."""
        super().__init__()
        self.module, self.head, self.adapter, self.start = module, module.head, adapter, start

    @torch.no_grad()
    def states(self, batch) -> torch.Tensor:
        """As SequenceLogProbs has them."""
        own = [p.clone() for p in self.adapter]
        try:
            self._put(self.start)
            return self.module.states(batch)
        finally:
            self._put(own)

    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.adapter, values):
            parameter.copy_(value)


class Opener:
    """Opens checkpoints one after the other and keeps the last: its base serves the next adapter."""

    def __init__(self, device: torch.device, gradients: bool, longest: int, parallel: OneRank | None = None,
                 recompute: bool = False):
        """`gradients`: LoRA weights are wanted; `longest`: tokens of the longest sequence to be scored; `parallel`: the
        ranks that share a batch; `recompute`: backward computes the layers again."""
        self.device, self.gradients, self.longest, self.parallel = device, gradients, longest, parallel or OneRank()
        self.recompute = recompute
        self.last: Opened | None = None
        self.starts: Opener | None = None  # of models that share no base
        self.hashes: dict = {}  # of bases, by name and precision
        self.checked: set = set()  # runs and their bases

    def open(self, checkpoint: Checkpoint) -> Opened:
        """Raises UserError for what can't be opened, naming it."""
        if self.last and self.last.checkpoint is checkpoint:
            return self.last
        (base, adapter), wanted = base_of(checkpoint.path), _made_of(checkpoint)
        if self.last and adapter and self.last.made_of == wanted:
            exchange_adapter(self.last.module.model, adapter)
            self.last = dataclasses.replace(self.last, checkpoint=checkpoint)
        else:
            self.last = None  # the former goes before the next comes,
            gc.collect()  # and at once: its layers refer to themselves
            self.last = self._load(checkpoint, adapter, *wanted)
        if adapter and checkpoint.settings.record:
            self._check_base(checkpoint, base)
        for contents in (checkpoint.contents, checkpoint.base):
            contents.check()  # what was loaded is what the results will be kept as
        return self.last

    def open_with_start(self, checkpoint: Checkpoint, start: Checkpoint) -> tuple[Opened, Opened]:
        """A checkpoint and step 0 of its run, both at once. Raises UserError as `open`."""
        if not _only_lora((made := _made_of(start))[1]) or made != _made_of(checkpoint):
            self.starts = self.starts or Opener(self.device, False, self.longest, self.parallel)
            first = self.starts.open(start)
            return self.open(checkpoint), first
        adapter = [p for name, p in self.open(start).module.named_parameters() if ".lora_" in name]
        values = [p.detach().clone() for p in adapter]
        opened = self.open(checkpoint)
        return opened, dataclasses.replace(opened, checkpoint=start, module=StepZero(opened.module, adapter, values))

    def _check_base(self, checkpoint: Checkpoint, base: str) -> None:
        """Raises UserError where the base under a run's adapter is not the one that it was trained on."""
        key, run = (base, checkpoint.recorded.bf16, bits_of(checkpoint.recorded)), Path(checkpoint.path).parent
        if (run, key) in self.checked:
            return
        if key not in self.hashes:  # scored in another precision than it was trained in
            dtype = storage_dtype(checkpoint.recorded.bf16, frozen=True)
            self.hashes[key] = base_hashes(open_base(base, dtype, checkpoint.settings.trust_remote_code, key[2]))
        check_base(self.hashes[key], base, checkpoint.settings.record, run)
        self.checked.add((run, key))

    def _load(self, checkpoint: Checkpoint, adapter: str | None, base: str, shape: dict | None, bf16: bool,
              bits: int | None) -> Opened:
        from ..model import selfcheck  # slow to import

        dtype = storage_dtype(bf16, frozen=adapter is not None or checkpoint.frozen)
        model = open_base(base, dtype, checkpoint.settings.trust_remote_code, bits)
        if checkpoint.settings.record and adapter:
            self.hashes[base, bf16, bits] = base_hashes(model)
        own = model.config._attn_implementation
        model = add_adapter(model, adapter)
        if self.recompute:
            turn_off_dropout(model)
        module, layout, attention = freeze(model, bf16, self.device, self.longest, self.parallel,
                                           recompute=self.recompute)
        trained = adapter_weights(model, checkpoint.path) if self.gradients else []
        distributed.say(f"{base}: {selfcheck.describe(layout, attention, self.parallel.size)}")
        return Opened(checkpoint, (base, shape, bf16, bits), module, layout, own, trained, self.recompute)


def _made_of(checkpoint: Checkpoint) -> tuple[str, dict | None, bool, int | None]:
    base, adapter = base_of(checkpoint.path)
    return base, adapter_shape(adapter), checkpoint.settings.bf16, bits_of(checkpoint.settings)


def _only_lora(shape: dict | None) -> bool:
    """Tells whether an adapter of this shape has LoRA weights and no others."""
    return bool(shape and shape.get("peft_type") == "LORA" and shape.get("bias", "none") == "none" and not any(
        shape.get(name) for name in ("modules_to_save", "trainable_token_indices")))


def check_references(checkpoints: list[Checkpoint]) -> None:
    """Raises UserError where a model that is here as a run's reference is not the one that the run had: its rewards
    would be others. On one rank; loads the model as the run did."""
    for model in checkpoints:
        base, adapter = base_of(model.path)
        for run, c in {Path(c.path).parent: c for c in runs_against(model, checkpoints)}.items():
            record = c.settings.record
            dtype = storage_dtype(c.recorded.bf16, frozen=arguments_of(record)["use_lora"])
            as_then = add_adapter(open_base(base, dtype, c.settings.trust_remote_code, bits_of(c.recorded)), adapter)
            check_reference(weights_hash(as_then, False).split(), model.path, record, run)


def open_device(local_rank: int, gpu_id: int | None) -> torch.device:
    """This rank's device; ranks only meet where a launcher started them."""
    if "RANK" in os.environ:
        return distributed.join_ranks(local_rank)
    gpu.round_alike()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(gpu_id or 0)  # what libraries put on "cuda" goes there too
    return torch.device("cuda", gpu_id or 0)
