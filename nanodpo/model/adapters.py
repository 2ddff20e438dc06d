"""Opens models and adapters with all their weights, and exchanges an adapter for that of another checkpoint.

Transformers and PEFT only warn of weights that a file lacks, and draw random ones in their place; weights that the
model has no place for they leave out. Here both are errors.
"""

import contextlib
import copy
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from ..data.urls import where_full
from ..errors import UserError, first_line
from ..files import read_text
from .hub import place_of
from .lora_settings import AS_PLAIN, check_readable
from .quantised import check_loaded, loading_options
from .sharding import sharded_as_read
from .source import BROKEN, check_attention, hold_logs

SETS = ("target_modules", "target_parameters", "exclude_modules")  # in an adapter's config; PEFT has them in any order
NOT_SHAPE = ("base_model_name_or_path", "peft_version", "inference_mode", "revision")  # of an adapter's config

# Tables of causal masks and of rotations, which files of old releases have beside the weights, and every model computes
# anew. Transformers itself passes over a tied output layer, and over parts that are not of the language model (heads
# that predict several tokens, towers for images).
TABLES = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)$")


def open_base(name: str, dtype, trust_remote_code: bool, bits: int | None = None, shared: dict | None = None):
    """A causal LM with its weights, its matrices quantised to so many bits, or its weights `shared` by the ranks (see
    sharding.py). Raises UserError for files that are broken, lack a weight, or have one of another shape or one too
    many."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with hold_logs(), sharded_as_read(shared, dtype) as finish:
            config = AutoConfig.from_pretrained(place_of(name), trust_remote_code=trust_remote_code)
            check_attention(config, name)
            if not getattr(config, "quantization_config", None):
                _check_kinds(Path(place_of(name)))
            model, keys = AutoModelForCausalLM.from_pretrained(
                place_of(name), dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True,
                ignore_mismatched_sizes=True, **loading_options(bits))  # the error below names the weight
            if keys["mismatched_keys"]:
                key, written, wanted = sorted(keys["mismatched_keys"])[0]
                raise UserError(f"{name}: does not fit its config.json: {key} is {list(written)} in the weights, and "
                                f"{list(wanted)} by the config")
            if keys["missing_keys"]:
                raise UserError(f"{name}: lacks {len(keys['missing_keys'])} of the model's weights, such as "
                                f"{min(keys['missing_keys'])}; copy them anew, or mend config.json")
            if strange := [key for key in keys["unexpected_keys"] if not TABLES.search(key)]:
                raise UserError(f"{name}: has {len(strange)} weights that its config.json has no place for, such as "
                                f"{min(strange)}; mend config.json, or save the model without them")
            finish(model)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{name}: the weights can't be loaded: {first_line(error)}{where_full(error)}") from error
    check_loaded(model, name, bits)
    make_alike(model)
    return model


def _check_kinds(folder: Path) -> None:
    """Raises UserError for weights in whole numbers, which transformers reads as floats of these values: they were
    quantised, and nothing says how."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                if name.endswith(".weight") and "F" not in (kind := weights.get_slice(name).get_dtype()):
                    raise UserError(f"{file}: {name} is of {kind}, and weights are floating-point numbers; name the "
                                    "model that was quantised")


def make_alike(model) -> None:
    """Takes out of a family's code what makes another model of it in training mode, or hides its decoder."""
    config = model.config.get_text_config()
    if getattr(config, "rescale_every", None):  # of rwkv, for float16: its first pass in eval mode divides weights in
        config.rescale_every = 0  # place, and a checkpoint that is saved then would have those
    for module in model.modules():
        if hasattr(module, "correction_coefs"):  # of gemma 3n, which reads them past their LoRA in training mode if
            module.config = copy.copy(module.config)  # altup_coef_clip is set; what is saved keeps it
            vars(module.config)["altup_coef_clip"] = None
    if model.base_model is model and hasattr(model, "model"):  # of llama 4: its prefix is that of another class
        model.base_model_prefix = "model"


def adapter_shape(adapter: str | None) -> dict | None:
    """An adapter's config without the entries that do not change its shape; None for a whole model."""
    if adapter is None:
        return None
    config = json.loads(read_text(Path(adapter) / "adapter_config.json"))
    for name in SETS:
        config[name] = sorted(names) if isinstance(names := config.get(name), list) else names
    return {key: value for key, value in config.items() if key not in NOT_SHAPE}


@contextlib.contextmanager
def no_false_alarm():
    """Without PEFT's warnings of what is an error here, of ranks of experts, which it uses all the same, and of biases
    of lora_B, which it takes for matrices that are cut."""
    with warnings.catch_warnings():
        for words in ("Found missing adapter keys", "Model has `tie_word_embeddings=True` and a tied layer is part of",
                      "The following (rank|alpha)_pattern keys did not match",
                      r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape"):
            warnings.filterwarnings("ignore", words)
        yield


def dora_norms(model) -> list[tuple]:
    """(magnitudes, norms), (out,) each, of every layer that has DoRA, whose output depends on their quotient: the norms
    of the rows of W + s B A, with the graph that PEFT cuts off. Empty without DoRA."""
    found = []
    for layer in model.modules():
        for name, dora in getattr(layer, "lora_magnitude_vector", {}).items():
            from peft.utils.integrations import dequantize_module_weight

            added = dora.get_lora_weight(layer.lora_A[name], layer.lora_B[name])
            weight = dequantize_module_weight(layer.get_base_layer()).to(added.dtype)
            found.append((dora.weight, dora.get_weight_norm(weight, added, layer.scaling[name])))
    return found


def plain_name(name: str) -> str:
    """The name that a weight, or a module, has without PEFT. It puts a layer of its own around each that it adapts, and
    one around another where it adapts several tensors of a module, such as stacked experts."""
    return re.sub(r"(\.base_layer)+(?=\.|$)", "", name)


def adapted(model) -> tuple[list[str], list[str]]:
    """The names of linear layers that have LoRA (q_proj), and of tensors that have it without a linear layer
    (experts.down_proj), each once."""
    layers = [(plain_name(name).rpartition(".")[2], layer) for name, layer in model.named_modules()
              if hasattr(layer, "lora_A")]
    tensors = {f"{name}.{layer.parameter_name}" for name, layer in layers if hasattr(layer, "parameter_name")}
    return sorted({name for name, layer in layers if not hasattr(layer, "parameter_name")}), sorted(tensors)


def add_adapter(model, adapter: str | None, trainable: bool = False):
    """The model with its adapter, in float32; the model itself where `adapter` is None. Raises UserError for an adapter
    that is broken or does not fit."""
    if adapter is None:
        return model
    from peft import PeftModel

    check_readable(adapter_shape(adapter), f"{adapter}/adapter_config.json")
    head, weights = model.get_output_embeddings(), _read(adapter)
    try:
        with no_false_alarm():
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
        _check_names(model, weights, adapter)
    except UserError:
        raise
    except BROKEN as error:
        grown = ("; if its model's vocabulary was grown, merge it where that model is (PEFT's merge_and_unload), and "
                 "name the merged model") * ("embed_tokens" in str(error))
        raise UserError(f"{adapter}: does not fit its base: {first_line(error)}{grown}") from error
    _check_within_layers(model.active_peft_config, adapter)
    _check_joined(model.active_peft_config, adapter)
    _check_scales(model, adapter, trainable)
    if model.get_base_model().get_output_embeddings() is not head:
        raise UserError(f"{adapter}: changes the output layer, which its target_modules or modules_to_save name; merge "
                        "the adapter (PEFT's merge_and_unload), and name the merged model")
    return model


def _check_within_layers(config, adapter: str) -> None:
    """Raises UserError for an adapter, of PEFT's `config`, that is not the layers' alone, or another one each time."""
    if config.is_prompt_learning:  # these are put in by PEFT's own forward pass alone
        raise UserError(f"{adapter}: is a {config.peft_type.value} adapter, which puts states of its own before a "
                        "prompt; only adapters within the layers can be scored (LoRA, IA3, OFT ...)")
    if getattr(config, "alora_invocation_tokens", None):  # looked for by PEFT's own forward pass alone
        raise UserError(f"{adapter}: is turned on by certain tokens of a text (alora_invocation_tokens); only adapters "
                        "that are on throughout a text can be scored")
    if str(start := getattr(config, "init_lora_weights", None)).startswith("pissa_niter"):
        raise UserError(f"{adapter}: has other log-probs each time: its init_lora_weights is {start!r}, by which PEFT "
                        f"draws random numbers to change the base, whenever it opens it; {AS_PLAIN}")


def _check_joined(config, adapter: str) -> None:
    """Raises UserError for LoRA on experts, from transformers 4, whose scales PEFT changes where it joins gate_proj and
    up_proj: it doubles rank and lora_alpha, as `config` has them, whatever else they depend on."""
    own = adapter_shape(adapter)
    odd = [name for name in ("use_rslora", "alpha_pattern") if own.get(name)]
    if odd and own["peft_type"] == "LORA" and (config.rank_pattern or {}) != (own.get("rank_pattern") or {}):
        raise UserError(f"{adapter}: is of transformers 4, which had layers for each expert; where PEFT joins them, "
                        f"their scales are not those of its {odd[0]}. Merge it where it was made (PEFT's "
                        "merge_and_unload), and name the merged model")


def _check_scales(model, adapter: str, trainable: bool) -> None:
    """Raises UserError for a scale of LoRA, lora_alpha / r, that is no number: the base would be said to be broken; and
    for 0 in what is to be trained: its gradient would be 0, too."""
    for name, layer in model.named_modules():
        for scale in getattr(layer, "scaling", {}).values() if hasattr(layer, "lora_A") else ():
            if not abs(scale) <= torch.finfo(torch.float32).max or (trainable and scale == 0):
                raise UserError(f"{adapter}: its adapter_config.json gives {name.removeprefix('base_model.model.')} a "
                                f"scale of {scale:g}, by lora_alpha or alpha_pattern; mend it there")


def check_mergeable(model, where: str) -> None:
    """Raises UserError for an adapter with a bias where its base has none to add it to; `where` begins the message."""
    for name, layer in model.named_modules():
        own = [b.bias for b in getattr(layer, "lora_B", {}).values() if b.bias is not None]
        if own and layer.get_base_layer().bias is None:
            raise UserError(f"{where}: lora_bias has no place to be merged into, since "
                            f"{name.removeprefix('base_model.model.')} has no bias; leave out --merge_weights")


def exchange_adapter(model, adapter: str) -> None:
    """Replaces the model's adapter by another one of the same shape. Raises UserError for one that does not fit."""
    from peft.utils import set_peft_model_state_dict

    weights = _read(adapter)
    try:
        set_peft_model_state_dict(model, weights)
    except BROKEN as error:
        raise UserError(f"{adapter}: can't be opened: {first_line(error)}") from error
    _check_names(model, weights, adapter)


def _read(adapter: str) -> dict:
    """An adapter's weights on disk, by name. Raises UserError for a file that is broken, or holds whole numbers."""
    from peft.utils import load_peft_weights

    try:
        weights = load_peft_weights(adapter, device="cpu")
        # Of LoRA alone: VB-LoRA and SHiRA have indices among their weights.
        odd = min((n for n, w in weights.items() if ".lora_" in n and not w.is_floating_point()), default=None)
    except BROKEN as error:
        raise UserError(f"{adapter}: its weights can't be read: {first_line(error)}") from error
    if odd:
        raise UserError(f"{adapter}: {odd} is of {str(weights[odd].dtype).removeprefix('torch.')}, and weights are "
                        "floating-point numbers; save the adapter as it was before it was quantised")
    return weights


def _check_names(model, weights: dict, adapter: str) -> None:
    """Raises UserError where the names of an adapter's weights on disk are not those of the model's adapter. Those of
    transformers 4, which had a layer for each expert, PEFT turns into today's whenever it opens them."""
    from peft.utils import get_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    weights = convert_peft_adapter_state_dict_for_transformers(model, model.active_peft_config, weights)
    with no_false_alarm():
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if lacking := expected.keys() - weights.keys():
        raise UserError(f"{adapter}: lacks {len(lacking)} of the weights that its adapter_config.json asks for, such "
                        f"as {min(lacking)}; copy the adapter anew")
    if strange := weights.keys() - expected.keys():
        whole = [name for name in strange if ".lora_" not in name]
        config = adapter_shape(adapter)
        lists = (config.get("target_modules"), config.get("modules_to_save"))
        named = [name for names in lists if isinstance(names, list) for name in names]
        part = min(whole, default="").removesuffix(".weight").removesuffix(".base_layer").rpartition(".")[2]
        whose = ("target_modules or modules_to_save name embeddings or a head" if part in named else
                 "PEFT saves the base's embeddings and head, too, where its vocabulary was grown")
        why = (f"; it is no LoRA weight ({whose}), and only LoRA on linear layers is supported: merge the adapter "
               "where its model is (PEFT's merge_and_unload), and name the merged model")
        raise UserError(f"{adapter}: has weights that its base or its adapter_config.json has no place for, such as "
                        f"{min(whole or strange)}{why * bool(whole)}")


def adapter_weights(model, path: str) -> list:
    """The adapter's parameters, made ready for gradients. Raises UserError for a model without one."""
    weights = [p for name, p in model.named_parameters() if ".lora_" in name]
    if not weights:
        raise UserError(f"--gradients: needs a LoRA adapter, and {path} has none; leave it out")
    for parameter in weights:
        parameter.requires_grad_(True)
    return weights
