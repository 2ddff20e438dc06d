"""Loads the policy and the reference, adds LoRA, and turns the policy into the reference for a while."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
from unittest import mock

import torch
from torch import nn
from torch.func import functional_call

from ..errors import UserError, first_line
from ..ranks.distributed import say, world_size
from ..screen import folded
from .adapters import adapted, add_adapter, check_mergeable, make_alike, no_false_alarm, open_base, plain_name
from .lora_settings import settings_text, take_over
from .precision import storage_dtype
from .quantised import bits_of, numel, quantised_layers
from .sharding import as_bytes, is_sharded, shape_of, whole
from .source import BROKEN, Source, name_and_revision

REQUANTISED = "; or another device, or release of bitsandbytes, than the run's has quantised it"


def load_model(source: Source, args, lora: dict | None = None, shared: dict | None = None) -> nn.Module:
    """The policy before training: the base model with its adapter, or with a fresh LoRA where args ask for one. `lora`:
    the settings of --peft_config; `shared`: from `sharding.shared_weights`. Raises UserError."""
    from transformers import AutoModelForCausalLM

    dtype, remote = storage_dtype(args.bf16, frozen=args.use_lora), args.trust_remote_code
    torch.manual_seed(args.seed)  # every rank draws the same weights
    if args.random_init:
        try:
            model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, trust_remote_code=remote)
            make_alike(model)
        except BROKEN as error:
            raise UserError(f"{source.base}: no model can be made of its config: {first_line(error)}") from error
    else:
        model = open_base(source.base, dtype, remote, bits_of(args), shared)
    if source.adapter:
        model = _open_adapter(model, source, args)
    elif args.use_lora:
        model = _add_lora(model, args, lora or {})
    for own in getattr(model, "peft_config", {}).values():
        own.base_model_name_or_path, own.revision = name_and_revision(source.base)
    if not args.allow_dropout:
        turn_off_dropout(model)
    elif world_size() > 1 and (name := next((name for module, name in _dropouts(model) if "layerdrop" in name
                                             and getattr(module, name)), None)):
        raise UserError(f"--allow_dropout: {name} of {args.model_name} leaves out other layers on each rank, and ZeRO "
                        "would add up gradients of different ones; set it to 0 in config.json, or train on one rank")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("no parameter is trainable")
    return model


def _open_adapter(model: nn.Module, source: Source, args) -> nn.Module:
    if not args.use_lora:
        raise UserError(f"--model_name {args.model_name} is an adapter; merge it into its base for full fine-tuning")
    model = add_adapter(model, source.adapter, trainable=True)
    own = model.peft_config["default"]
    check_plain_lora(model, args.model_name)
    if own.lora_bias and args.merge_weights:
        check_mergeable(model, f"the adapter {args.model_name}")
    settings = {name: getattr(own, name) for name in ("r", "lora_alpha", "lora_dropout", "target_modules")}
    take_over(args, settings, f"the adapter {args.model_name}")
    return model


def check_plain_lora(model: nn.Module, where: str) -> None:
    """Raises UserError where anything but LoRA on linear layers is trained, which may be so by its target_modules:
    lora_settings.py has refused all other settings that ask for it. `where` begins the message."""
    plain = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector)\.default\.(weight|bias)$")
    if odd := [name for name, p in model.named_parameters() if p.requires_grad and not plain.search(name)]:
        kind = "LoRA on embeddings (target_modules): " * (".lora_embedding_" in odd[0])
        raise UserError(f"{where}: trains {kind}{odd[0]}; only LoRA on linear layers is supported. Leave that out, or "
                        "merge a trained adapter (PEFT's merge_and_unload) and name the merged model")
    head = getattr(model.get_base_model().get_output_embeddings(), "weight", None)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and any(p is head for p in layer.get_base_layer().parameters(recurse=False)):
            raise UserError(f"{where}: trains LoRA on {plain_name(name).removeprefix('base_model.model.')}, whose "
                            "weight is the output layer's, too, and would be another there once it is merged; leave it "
                            "out of target_parameters")


def _add_lora(model: nn.Module, args, lora: dict) -> nn.Module:
    """The model with a fresh adapter by the flags and, where there are some, the settings `lora` of --peft_config."""
    from peft import LoraConfig, get_peft_model

    asked, head = args.lora_target_modules, model.get_output_embeddings()
    names = lora.get("target_modules", asked if asked == "all-linear" else asked.split(","))
    flag = f"--peft_config {args.peft_config}" if lora else f"--lora_target_modules {asked}"
    linear = ", ".join(sorted({name.rpartition(".")[2] for name, layer in model.named_modules()
                               if isinstance(layer, nn.Linear) and layer is not head}))
    if names == "all-linear" and (odd := _odd_linears(model)):
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
                 and layer not in odd and layer is not head]
    elif isinstance(names, list):
        names = [name.strip() for name in names if name.strip()]
        modules = [name for name, _ in model.named_modules()]
        if unknown := [n for n in names if not any(m == n or m.endswith("." + n) for m in modules)]:
            raise UserError(f"{flag.partition(' ')[0]}: the model has no module {', '.join(unknown)}; its linear "
                            f"layers are {linear}")
    flags = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    try:
        with _drawn_in_float32(), no_false_alarm():
            model = get_peft_model(model, LoraConfig(**flags | lora | {"target_modules": names,
                                                                       "task_type": "CAUSAL_LM"}))
    except BROKEN as error:
        why = first_line(error) if lora else first_line(error).replace("`target_modules`", "--lora_target_modules")
        there = f" The model's linear layers are {linear}." * (names == "all-linear")
        raise UserError(f"{flag}: {why}{there}") from error
    if model.get_base_model().get_output_embeddings() is not head:
        raise UserError(f"{flag.partition(' ')[0]}: the output layer can't be adapted; leave it out")
    check_plain_lora(model, flag)
    if lora:
        _check_used(model, lora, flag)
    if lora.get("lora_bias") and args.merge_weights:
        check_mergeable(model, flag)
    return model


def _odd_linears(model: nn.Module) -> set[nn.Linear]:
    """Layers that are linear by class, and return something else, as routers do. Tried without numbers."""
    odd = {layer for layer in model.modules() if isinstance(layer, nn.Linear)
           and type(layer).forward is not nn.Linear.forward} - {*quantised_layers(model)}
    for layer in list(odd):
        weights = {name: torch.empty(shape_of(p), device="meta") for name, p in layer.named_parameters()}
        with contextlib.suppress(*BROKEN):
            out = functional_call(layer, weights, torch.empty(1, layer.in_features, device="meta"))
            if getattr(out, "shape", None) == (1, layer.out_features):
                odd.remove(layer)
    return odd


def _check_used(model: nn.Module, lora: dict, where: str) -> None:
    """Raises UserError for a pattern that no adapted layer fits, which PEFT passes over."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in model.named_modules()
              if hasattr(layer, "lora_A")}
    tensors = [plain_name(name) for name, _ in model.named_parameters()]
    for target in lora.get("target_parameters", ()):
        if not any(name.endswith(f".{target}") for name in tensors):
            raise UserError(f"{where}: target_parameters has {target!r}, which is no weight of the model")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(name, ()):
            if not any(re.match(rf"(.*\.)?({pattern})$", layer) for layer in layers):  # as PEFT reads it
                raise UserError(f"{where}: {name} has {pattern!r}, which fits no layer that has LoRA")
    asked = lora.get("layers_to_transform", ())
    for number in [asked] if isinstance(asked, int) else asked:
        if not any(f".{number}." in layer for layer in layers):
            raise UserError(f"{where}: layers_to_transform has {number}, which is no layer that has LoRA")


@contextlib.contextmanager
def _drawn_in_float32():
    """Keeps PEFT from rounding a fresh adapter to the dtype of its base, so that it is the same with --bf16 and
    without.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    with contextlib.ExitStack() as stack:
        for kind in (BaseTunerLayer, ParamWrapper):
            stack.enter_context(mock.patch.object(kind, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None))
        yield


def _dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where dropout rates are, (module, name of its attribute) each: those of modules, the floats in attention layers,
    those by which whole layers are left out, the noise of MoE routers. phimoe's router_jitter_noise is none: its
    routing compares scores with it, in eval mode too."""
    found = []
    for module in model.modules():
        found += [(module, "p")] * isinstance(module, nn.Dropout)
        found += [(module, name) for name, value in vars(module).items()
                  if re.search("dropout|layerdrop|pdrop|jitter", name) and name != "router_jitter_noise"
                  and isinstance(value, float)]
    return found


def turn_off_dropout(model: nn.Module) -> None:
    """Sets every rate of dropout to 0, so that training mode computes what eval mode does."""
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def describe(model: nn.Module) -> str:
    """For the screen: how many parameters are trained, their dtype, the modules with LoRA, and rates of dropout."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    count, total = sum(numel(p) for _, p in trained), sum(map(numel, model.parameters()))
    dtype = str(trained[0][1].dtype).removeprefix("torch.")
    line = f"model: {total:,} parameters, {count:,} of them trained ({count / total:.2%}), {dtype}"
    if held := sum(numel(layer.weight) for layer in quantised_layers(model)):
        line += f"; {held:,} held in {'4' if hasattr(quantised_layers(model)[0].weight, 'quant_state') else '8'} bits"
    names = [name for kind in adapted(model) for name in kind]
    line += f"\n  LoRA on {', '.join(names)}" if names else "; full fine-tuning"
    if rates := sorted({getattr(module, name) for module, name in _dropouts(model)} - {0.0}):
        line += f"\n  dropout in training passes, with rates {', '.join(map(str, rates))}"
    return folded(line)


def weights_hash(model: nn.Module, fresh_lora: bool, as_read: bool = False) -> str:
    """Hashes of the reference, separated by spaces: of its base's weights, its config, and its adapter where it has
    one. Where the ranks share the base's weights, all must call it, or, `as_read`, the first hash is another one: of
    what this rank has read.

    A fresh LoRA is not part of the reference, so runs that differ in its rank or seed have the same hashes.
    """
    hashes = base_hashes(model, as_read)
    if not fresh_lora and hasattr(model, "peft_config"):
        digest = hashlib.sha256(settings_text(model.peft_config["default"]).encode())
        _add_tensors(digest, {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name})
        hashes.append(digest.hexdigest())
    return " ".join(hashes)


def base_hashes(model: nn.Module, as_read: bool = False) -> list[str]:
    """[hash of a base's weights, hash of its config]; the same with an adapter on it and without. `as_read` as above.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if as_read and is_sharded(inner):
        weights = inner.hash_as_read
    else:
        tensors = {plain_name(name): tensor for name, tensor in inner.state_dict(keep_vars=True).items()
                   if ".lora_" not in name}
        _add_tensors(digest := hashlib.sha256(), tensors)
        weights = digest.hexdigest()
    config = {key: value for key, value in inner.config.to_dict().items()
              if key not in ("_name_or_path", "transformers_version")}
    return [weights, hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()]


def _add_tensors(digest, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        with whole(tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(as_bytes(tensor))


def check_base(hashes: list[str], base: str, record: dict, run) -> None:
    """Raises UserError where a base is not the one that a run started from: `hashes` are from `base_hashes`, in the
    run's precision, and `record` is the run's run.json."""
    recorded = str(record.get("weights", "")).split()
    if len(recorded) < 2:
        return say(f"{run}/run.json: has no hash of its base's weights; {base} is taken as it is")
    back = f"put back what was there, or copy it to another folder and name that in {run}'s adapter_config.json files"
    if hashes[0] != recorded[0]:
        back += REQUANTISED * bool(record.get("quantisation"))
        raise UserError(f"{base}: holds other weights than those that {run} was trained on; {back}")
    if hashes[1] != recorded[1] and not _read_otherwise(base, record, run):
        raise UserError(f"{base}: its config.json is not the one that {run} was trained with; {back}")


def _read_otherwise(place: str, record: dict, run) -> bool:
    """Tells whether another release of transformers than the run's has read the config of a model, and says so."""
    then, now = record.get("versions", {}).get("transformers"), importlib.metadata.version("transformers")
    if then != now:
        say(f"{place}: transformers {now} reads its config differently from {then}, under which {run} was trained")
    return then != now


def check_reference(hashes: list[str], place: str, record: dict, run) -> None:
    """Raises UserError where a model is not the reference that a run had: `hashes` are from `weights_hash`, of the
    model as the run opened it, and `record` is the run's run.json."""
    recorded = str(record.get("reference") or "").split()
    if len(recorded) < 2:
        return say(f"{run}/run.json: has no hash of its reference's weights; {place} is taken as it is")
    back = f"than when it was the --reference of {run}; put back what was there"
    if (hashes[0], hashes[2:]) != (recorded[0], recorded[2:]):  # of its base, and of its adapter where it has one
        raise UserError(f"{place}: has other weights {back}" + REQUANTISED * bool(record.get("quantisation")))
    if hashes[1] != recorded[1] and not _read_otherwise(place, record, run):
        raise UserError(f"{place}: has another config {back}")


def load_reference(source: Source | None, adapter_off: bool, args, shared: dict | None) -> nn.Module | None:
    """The model of --reference in the policy's precision; None without it, and where the policy serves, with its
    adapter off. `shared` as in `load_model`. Raises UserError."""
    if source is None or adapter_off:
        return None
    dtype = storage_dtype(args.bf16, frozen=args.use_lora)
    model = open_base(source.base, dtype, args.trust_remote_code, bits_of(args), shared)
    return add_adapter(model, source.adapter)


@contextlib.contextmanager
def reference_policy(model: nn.Module, adapter_off: bool):
    """Within this the model is the reference: in eval mode and, where asked for, with the adapter off.

    Only to be used before the first step, since full fine-tuning and an adapter that is trained on change the weights
    of the reference. After the block the model has its mode again.
    """
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter() if adapter_off else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)
