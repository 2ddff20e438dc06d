"""Checkpoints: folders that plain PEFT and transformers open.

A checkpoint is written under another name, read back, compared with the weights in memory, and renamed. Its
manifest.json has the step, and the size and hash of every file.
"""

from pathlib import Path
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn

from ..data.template import read_template
from ..errors import RunStopped, UserError, first_line
from ..model.adapters import SETS, add_adapter, check_mergeable, no_false_alarm, open_base
from ..model.quantised import quantised_layers, without_bits
from ..model.sharding import whole
from ..model.source import base_of
from ..ranks.distributed import is_main, say
from ..screen import folded
from .atomic import new_folder, remove, saved_steps


def gather(model: nn.Module, only_trained: bool) -> dict[str, torch.Tensor]:
    """Weights by name, whole and on CPU, on rank 0; nothing on the others. With ZeRO-3 all ranks must call it."""
    state = {}
    for name, parameter in model.named_parameters():
        if only_trained and not parameter.requires_grad:
            continue
        with whole(parameter):
            if is_main():
                state[name] = parameter.detach().cpu().clone()
    return state


def save(model: nn.Module, tokenizer, state: dict[str, torch.Tensor], folder: Path, facts: dict,
         texts: dict[str, str] | None = None) -> None:
    """Writes model (or adapter) and tokenizer to `folder`, on one rank. Raises RunStopped where the disk won't take it,
    or has not what was written; then nothing of it stays.

    `state` has the weights from `gather`: of the adapter, or of the whole model. `facts` go into the manifest.
    `texts` are further files by name (card.py).
    """
    with new_folder(folder, facts) as place:
        _write(model, tokenizer, state, place)
        tokenizer.save_pretrained(place)
        for name, text in (texts or {}).items():
            (place / name).write_text(text, encoding="utf-8")
        verify(place, _published(model, state))


def _write(model: nn.Module, tokenizer, state, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        own = model.peft_config["default"]
        for name in SETS:
            if isinstance(names := getattr(own, name), set):
                setattr(own, name, sorted(names))  # the order of a set is another one in each process
        with mock.patch.object(type(model), "create_or_update_model_card"), no_false_alarm():  # no card: see card.py
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    else:
        _mend_generation(model)
        if ends := other_ends(model, tokenizer):
            model.generation_config.eos_token_id = ends
        kept = model.state_dict().keys()  # not every buffer is meant to be saved
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
        model.save_pretrained(folder, state_dict=state | buffers)


def _mend_generation(model: nn.Module) -> None:
    """Many published models have sampling settings without sampling, or worse, and transformers saves none of them."""
    from transformers import GenerationConfig

    try:
        model.generation_config.validate(strict=True)
        return
    except ValueError:
        model.generation_config.do_sample = True
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        say(f"the model's generation config is left out, since transformers refuses it: {first_line(error)}")
        model.generation_config = GenerationConfig.from_model_config(model.config)


def other_ends(model: nn.Module, tokenizer) -> list[int]:
    """The eos_token_ids that the model's generation config should have, where it lacks the token that ends a turn, as
    that of a base model with a chat template does; else an empty list. A turn that ends in several tokens has no such
    token."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    try:
        turn_end = tokenizer.get_vocab().get(read_template(tokenizer).end)
    except UserError:  # a template that can't be read, beside an adapter that is only merged
        return []
    return [] if turn_end is None or turn_end in ends else [*ends, turn_end]


def say_ends(model: nn.Module, tokenizer) -> str:
    """Lines for the screen about an adapter, which has no generation config, where that of its base lacks the token
    that ends a turn; else an empty text."""
    if not hasattr(model, "peft_config") or not (ends := other_ends(model, tokenizer)):
        return ""
    return folded(f"\nturns end with {tokenizer.convert_ids_to_tokens(ends[-1])}, at which the base does not stop, and "
                  f"an adapter can't say so: generate with eos_token_id={ends} (vLLM: stop_token_ids); merged weights "
                  "say it")


def _published(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as transformers saves them: with the names and shapes of the model family's published files."""
    from transformers.core_model_loading import revert_weight_conversion

    return state if hasattr(model, "peft_config") else revert_weight_conversion(model, dict(state))


def verify(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Opens the written weights again. Raises RunStopped unless every tensor is there, bit for bit, and finite."""
    # PEFT's names in files; DoRA's magnitudes lose their ".weight" there.
    expected = {name.replace("_vector.default.weight", "_vector").replace(".default.", "."): tensor
                for name, tensor in state.items()}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as written:
            for name in written.keys():
                tensor = written.get_tensor(name)
                in_memory = expected.pop(name, tensor)
                if not tensor.isfinite().all():
                    raise RunStopped(f"{folder}: {name} holds values that are not finite")
                if not tensor.numel() or not torch.equal(tensor, in_memory):  # also of another shape
                    raise RunStopped(f"{folder}: {name} was not written as it is in memory")
    if expected:
        raise RunStopped(f"{folder}: {next(iter(expected))} was not written")


def check_trained(state: dict[str, torch.Tensor]) -> None:
    """Raises RunStopped where every lora_B is zero, as at the start: no update has reached the adapter."""
    lora_b = [tensor for name, tensor in state.items() if ".lora_B." in name]
    if lora_b and not any(tensor.any() for tensor in lora_b):
        raise RunStopped("every lora_B is zero after training: no update reached the adapter")


def rotate(run: Path, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep`; the starting point, checkpoint-0, always stays."""
    if keep:
        for step in [s for s in saved_steps(run) if s > 0][keep:]:
            remove(run / f"checkpoint-{step}")


def merge(adapter: Path, folder: Path, dtype: torch.dtype, trust_remote_code: bool, check=lambda model, base: None,
          texts: dict[str, str] | None = None, bits: int | None = None) -> None:
    """Merges an adapter into its base and saves the whole model, in one process, on CPU. `check(model, base's name)`
    may raise before, for a base that is not the right one. A quantised base is merged as the matrices that it stands
    for: on those the adapter was trained."""
    from transformers import AutoTokenizer

    base, _ = base_of(str(adapter))
    model = open_base(base, dtype, trust_remote_code, bits)
    check(model, base)
    if quantised_layers(model):
        model = without_bits(model, dtype)
    model = add_adapter(model, str(adapter))
    check_mergeable(model, str(adapter))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()  # the product B A is rounded once, when it is added
    # Without this PEFT rounds the product for a mixture's experts, too, to the dtype of their weights.
    with mock.patch("peft.tuners.lora.layer.ALLOWED_COMPUTE_DTYPES", ()):
        model = model.merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    save(model, tokenizer, dict(model.named_parameters()), folder, {"merged": adapter.name}, texts)
