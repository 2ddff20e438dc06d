"""ZeRO-3 while a model is read: each weight is cut into the ranks' parts as soon as it is there, so that no rank ever
holds more than its part and the weight that is being read. DeepSpeed's engine cuts what is whole when it is made.

Transformers' own way (HfDeepSpeedConfig) reads in one dtype for all weights, without its checks of missing and misfit
ones, and draws the weights of a fresh adapter or model otherwise. So here only the keeping differs: transformers reads
as without ZeRO, and hands over one weight after the other. Every rank reads all of them: no rank waits for another one
while it reads, and a file that one of them lacks is an error like any other.
"""

import contextlib
import hashlib
import os
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def shared_weights(settings: dict) -> dict | None:
    """DeepSpeed's settings where its ranks share the weights from their reading on; else None."""
    return settings if stage_of(settings) == 3 else None


def stage_of(settings: dict) -> int:
    """ZeRO's stage by DeepSpeed's settings."""
    return settings.get("zero_optimization", {}).get("stage", 0)


@contextlib.contextmanager
def sharded_as_read(settings: dict | None, dtype: torch.dtype):
    """Within this a model that transformers opens keeps this rank's part of each weight alone; with None, all of them.
    Yields a function of the open model: to be called within, it mends what its shards have hidden from transformers,
    and keeps a hash of all that this rank has read as the model's `hash_as_read`."""
    if settings is None:
        yield lambda model: None
        return
    import deepspeed  # slow to import

    # The module is empty, but with one DeepSpeed also sets its matrix product for stage 3, as the engine does.
    cut = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)
    read = {}  # {id of a weight: (weight, module, name, hash)}

    def shard(module: nn.Module, name: str, parameter: Tensor) -> None:
        # Transformers marks what it has read; it makes an empty model first, and may tie a weight to another one.
        if getattr(parameter, "_is_hf_initialized", False) and not parameter.is_meta and not is_sharded(parameter):
            read[id(parameter)] = parameter, module, name, hashlib.sha256(as_bytes(parameter)).hexdigest()
            parameter.data = parameter.data.to(cut.local_device)
            cut._convert_to_deepspeed_param(parameter)  # DeepSpeed's own next line sends rank 0's to all
            parameter.partition()

    def finish(model: nn.Module) -> None:
        for parameter, module, name, digest in read.values():
            other = read[id(getattr(module, name))]
            if other[-1] != digest:  # tied by transformers, to which two weights without their numbers are equal
                setattr(module, name, parameter)
        tied = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {a: b for a, b in tied if model.get_parameter(a) is model.get_parameter(b)}
        model.hash_as_read = hashlib.sha256("".join(digest for *_, digest in read.values()).encode()).hexdigest()

    with (register_module_parameter_registration_hook(shard),
          mock.patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1")):  # threads would read the whole model ahead
        yield finish


def is_sharded(model_or_weight: nn.Module | Tensor) -> bool:
    """Whether the ranks share this weight, or any of this model's."""
    weights = model_or_weight.parameters() if isinstance(model_or_weight, nn.Module) else [model_or_weight]
    return any(hasattr(weight, "ds_id") for weight in weights)


def gather_in_forward(module: nn.Module, settings: dict) -> None:
    """Lets the ranks gather the weights that they share layer by layer, as a module without an optimizer is called."""
    import deepspeed  # slow to import

    deepspeed.initialize(model=module, config=settings)


def let_go(model: nn.Module) -> None:
    """Frees the shared weights of a model that is not called again; DeepSpeed keeps the model itself."""
    for weight in filter(is_sharded, model.parameters()):
        weight.data = weight.ds_tensor.data = torch.empty(0)


@contextlib.contextmanager
def whole(weight: Tensor):
    """Within this a weight that the ranks share is whole on each of them, which must all enter it."""
    if not is_sharded(weight):
        yield
        return
    import deepspeed  # slow to import, and score.py shares no weight

    with deepspeed.zero.GatheredParameters([weight]):
        yield


def shape_of(weight: Tensor) -> torch.Size:
    """Of the whole weight."""
    return getattr(weight, "ds_shape", weight.shape)


def cast(weight: Tensor, dtype: torch.dtype) -> None:
    """Changes the dtype of a weight, or of this rank's part of it."""
    weight.data = weight.data.to(dtype)
    if is_sharded(weight):
        weight.ds_tensor.data = weight.ds_tensor.data.to(dtype)


def as_bytes(tensor: Tensor):
    """The bytes of a tensor, in order, as NumPy has them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
