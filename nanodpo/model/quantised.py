"""Bases whose matrices bitsandbytes holds in 4 or 8 bits a number, as --load_in_4bit and --load_in_8bit ask for, or as
they are stored. LoRA is trained on them: QLoRA, arXiv 2305.14314.

A matrix is dequantised for each product, and again in backward, so the gradient is that of this very product. The
layers of bitsandbytes round more, and not always the same: with 8 bits the inputs, too, but not on a CPU in training;
with 4 bits, on some CPUs, inputs to bfloat16, but not in training. There the policy would not start at its reference.
"""

import copy
import functools
import importlib.util
import logging
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

from ..errors import UserError
from .precision import FrozenProduct
from .sharding import shape_of

# As transformers' BitsAndBytesConfig calls them. 4 bits as in the paper: NormalFloat, with double quantisation.
QUANTISATION = {4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
                8: {"load_in_8bit": True}}


def bits_of(args) -> int | None:
    """4 or 8, as these flags ask for. Raises UserError where they ask for both."""
    if args.load_in_4bit and args.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit: give one of them")
    return 4 if args.load_in_4bit else 8 if args.load_in_8bit else None


def check_quantised(bits: int | None, stored: dict | None, name: str, use_lora: bool = True,
                    zero_stage: int = 0) -> None:
    """Raises UserError where the model `name` can't be opened in so many bits, or not be trained so. `stored`: how it
    is quantised on disk, by its config.json."""
    if not (bits or stored):
        return
    what = f"--load_in_{bits}bit" if bits else f"model {name}: its weights are quantised"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what}: the package bitsandbytes is not installed; install it (pip install bitsandbytes)")
    if bits and stored and not stored.get(f"load_in_{bits}bit"):
        raise UserError(f"{what}: {name} is stored in {12 - bits} bits; leave the flag out")
    if stored and (stored.get("llm_int8_has_fp16_weight") or stored.get("bnb_4bit_quant_storage", "uint8") != "uint8"):
        raise UserError(f"model {name}: llm_int8_has_fp16_weight and bnb_4bit_quant_storage, in quantization_config of "
                        "its config.json, are not supported; name the model that it comes from, with --load_in_4bit")
    if not use_lora:
        raise UserError(f"{what}: quantised weights can't be trained, only LoRA on them; leave out --use_lora false "
                        "and --lora_r 0, or train the model in full precision")
    if zero_stage == 3:
        raise UserError(f"{what}: stage 3 of ZeRO shards a matrix without the constants that dequantise it; use a "
                        "stage of 0 to 2")


def loading_options(bits: int | None) -> dict:
    """Arguments of `from_pretrained`, which quantises on this process's device: a CPU takes minutes for 7B."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig  # slow to import

    return {"quantization_config": BitsAndBytesConfig(**QUANTISATION[bits])}


def check_loaded(model: nn.Module, name: str, bits: int | None) -> None:
    """Raises UserError where what was loaded is not quantised as it should be."""
    held = quantised_layers(model)
    if bits and not held:
        raise UserError(f"--load_in_{bits}bit: {name} has no linear layer that bitsandbytes quantises")
    if any(type(layer).__name__ in ("Linear4bit", "Linear8bitLt") for layer in {*model.modules()} - {*held}):
        raise UserError(f"{name}: its config.json says that its weights are quantised, and they are not; take "
                        "quantization_config out of it")
    if model.get_output_embeddings() in held:
        raise UserError(f"{name}: its output layer is stored quantised, which is not supported; name the model that it "
                        "comes from, with --load_in_4bit")


def quantised_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers whose matrix is held in 4 or 8 bits."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_quantised(layer.weight)]


def is_quantised(weight: Tensor) -> bool:
    return not weight.is_floating_point()


def numel(weight: Tensor) -> int:
    """The numbers that a weight stands for: two of 4 bits are packed into a byte."""
    state = getattr(weight, "quant_state", None)
    return state.shape.numel() if state else shape_of(weight).numel()


def multiply_dequantised(model: nn.Module) -> None:
    """Exchanges the product in each quantised layer for an exact one."""
    for layer in quantised_layers(model):
        if not hasattr(layer.weight, "quant_state"):  # 8 bits: a scale for each row, which goes where the layer goes
            layer.register_buffer("scale", layer.weight.SCB, persistent=False)
            layer.weight.CB = None  # the same numbers
        layer.forward = functools.partial(_product, layer)


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """(..., in) -> (..., out): W x + b."""
    return FrozenProduct.apply(x, layer.weight, layer.bias, functools.partial(dequantised, layer))


def dequantised(layer: nn.Linear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in): the matrix that the bits of `weight` stand for."""
    from bitsandbytes import functional

    if hasattr(layer.weight, "quant_state"):
        return _as_one_row(functional.dequantize_4bit, weight, layer.weight.quant_state).to(dtype)
    return functional.int8_vectorwise_dequant(weight, layer.scale).to(dtype)


def _as_one_row(dequantize_4bit: Callable, weight: Tensor, state) -> Tensor:
    """The matrix that `dequantize_4bit` of bitsandbytes gives, made as a single row. On a CPU with AVX-512 it takes
    wrong constants where a row ends within a block of 64 numbers (0.50.2); those of a matrix lie one behind the other.
    """
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(weight, flat).view(state.shape)


def without_bits(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model, on CPU, whose matrices are those that its bits stand for."""
    from bitsandbytes import functional

    own = functools.partial(_as_one_row, functional.dequantize_4bit)
    logging.getLogger("transformers.integrations.bitsandbytes").disabled = True  # it says the dtype, once
    model.cpu()
    for layer in quantised_layers(model):
        if getattr(layer.weight, "SCB", None) is not None:  # of 8 bits: a scale for each row, which `cpu` leaves behind
            layer.weight.SCB = layer.weight.SCB.cpu()
    with mock.patch.object(functional, "dequantize_4bit", own):
        return model.dequantize(dtype)
