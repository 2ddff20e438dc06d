"""Checkpoints for analysis and for going on from: what plain PEFT and transformers open, nothing of ours around it.

A checkpoint is written beside its place, read back and compared with the weights in memory, then renamed into place.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from .errors import UserError


def gather(model: nn.Module, only_trained: bool) -> dict[str, torch.Tensor]:
    """Weights by name, whole and on CPU, on every rank; with ZeRO-3 all ranks must call it."""
    import deepspeed

    state = {}
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        sharded = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
            state[name] = parameter.detach().cpu().clone()
    return state


def save(model: nn.Module, tokenizer, state: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes model (or adapter) and tokenizer to `folder`, on one rank; raises OSError.

    Nothing half-written is left, whatever happens. `state` is what `gather` gave: the weights of the adapter, or of
    the whole model.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(model, state, aside)
        tokenizer.save_pretrained(aside)
        verify(aside, state)
        for file in aside.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors writes for the owner's eyes only
            _flush(file)
        os.rename(aside, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(model: nn.Module, state, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    else:
        kept = model.state_dict().keys()  # not every buffer is meant to be saved
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        model.save_pretrained(folder, state_dict=state | buffers)


def verify(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Opens the written weights again. Raises RuntimeError unless every tensor is there, bit for bit, and finite."""
    from safetensors.torch import load_file

    written = {}
    for file in folder.glob("*.safetensors"):
        written |= load_file(file)
    if empty := [name for name, tensor in written.items() if not tensor.numel()]:
        raise RuntimeError(f"{folder}: {empty[0]} was written without its values")
    for name, tensor in state.items():
        found = written.get(name.replace(".default.", "."))
        if found is None or found.shape != tensor.shape or not torch.equal(found, tensor):
            raise RuntimeError(f"{folder}: {name} was not written as it is in memory")
        if not found.isfinite().all():
            raise RuntimeError(f"{folder}: {name} holds values that are not finite")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def rotate(run: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep`; the starting point, checkpoint-0, always stays."""
    steps = sorted(int(folder.name.split("-")[1]) for folder in run.glob("checkpoint-*"))
    for step in [s for s in steps if s > 0][: -keep if keep else 0]:
        shutil.rmtree(run / f"checkpoint-{step}")


def merge(adapter: Path, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """Adds an adapter into its base and saves the whole model, in one process, on CPU."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=dtype, trust_remote_code=trust_remote_code)
    model = model.merge_and_unload()
    save(model, AutoTokenizer.from_pretrained(adapter), dict(model.named_parameters()), folder)


def claim(folder: Path) -> None:
    """Raises UserError unless `folder` can become a run's: new or empty, in a place that can be written."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder}: is in use; name a new folder")
    parent = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"--output_dir {folder}: {parent} is a file")
    try:
        tempfile.TemporaryFile(dir=parent).close()  # permission bits don't tell of read-only and odd file systems
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {parent} can't be written to ({error.strerror})") from error
