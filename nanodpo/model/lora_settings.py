"""The settings of a LoRA adapter beyond train.py's flags, from a file in the form of PEFT's adapter_config.json."""

import dataclasses
import json
import re

from ..errors import UserError
from ..flags.limits import BELOW_1, Limit
from ..flags.settings import read_mapping
from ..flags.unknown import hint

FLAGS = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
         "target_modules": "lora_target_modules"}
# Entries of an adapter_config.json that tell where it comes from, or do nothing by themselves.
ASIDE = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "peft_type",
         "task_type", "megatron_core", "qalora_group_size", "runtime_config")


def _names(value) -> bool:
    """Names of modules: a list of them, or a regular expression."""
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) and name for name in names)


def _whole(value) -> bool:
    return type(value) is int and value > 0


TRUTH = Limit("must be true or false", lambda value: isinstance(value, bool))
COUNT = Limit("must be a whole number above 0", _whole)
NAMES = Limit("must be a list of names, or a regular expression", _names)
PATTERN = Limit("must be an object of names, or regular expressions, with a whole number above 0 for each",
                lambda value: isinstance(value, dict) and all(map(_whole, value.values())) and _names([*value]))
NUMBER = Limit("must be a number", lambda value: type(value) in (int, float))
TAKEN = {
    "r": COUNT, "lora_alpha": COUNT, "rank_pattern": PATTERN, "alpha_pattern": PATTERN,
    "lora_dropout": Limit(BELOW_1.words, lambda value: type(value) in (int, float) and BELOW_1.holds(value)),
    "target_modules": NAMES, "exclude_modules": NAMES, "layers_pattern": NAMES,
    "target_parameters": Limit("must be a list of names", lambda value: isinstance(value, list) and _names(value)),
    "use_rslora": TRUTH, "use_dora": TRUTH, "lora_bias": TRUTH, "fan_in_fan_out": TRUTH,
    "layers_to_transform": Limit("must be a layer's number, from 0, or a list of them", lambda value: all(
        type(layer) is int and layer >= 0 for layer in (value if isinstance(value, list) else [value]))),
    "init_lora_weights": Limit('must be true or "gaussian": the adapter must add exactly nothing at the start, on the '
                               "base as it is, since the policy of step 0 is compared with it",
                               lambda value: value is True or value == "gaussian"),
}
# What an adapter that is opened may have for these: its scales may be any numbers.
OWN = {name: limit for name, limit in TAKEN.items() if name != "init_lora_weights"} | {
    "lora_alpha": NUMBER, "bias": Limit("must be none, all or lora_only", ("none", "all", "lora_only").__contains__),
    "alpha_pattern": Limit("must be an object of names, or regular expressions, with a number for each",
                           lambda value: isinstance(value, dict) and all(map(NUMBER.holds, value.values())))}
WHY_NOT = {  # of those that can't be trained, resumed or scored exactly
    "bias": "trains the base's own biases, and with the adapter off the model would no longer be its base; lora_bias "
            "gives the adapter biases of its own",
    "modules_to_save": "trains whole layers beside LoRA, such as embeddings or a head; nanodpo trains LoRA alone, or "
                       "with --use_lora false the whole model",
    "trainable_token_indices": "trains tokens' embeddings; nanodpo trains LoRA on linear layers alone, or with "
                               "--use_lora false the whole model",
    "layer_replication": "makes another model of the base, with layers that are there twice",
    "alora_invocation_tokens": "turns the adapter on within a text, where packed batches have several texts in a row",
}
NOT_EXACT = "is not one that nanodpo can train exactly"
# How an adapter's start was drawn, which says nothing of it any more once it is trained; but after some ways of drawing
# PEFT changes the base, or freezes a part of the adapter, whenever it opens the adapter.
OF_STARTS = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config")
LASTING = re.compile("pissa|corda|olora|loftq|mica", re.IGNORECASE)
AS_PLAIN = ("save it as plain LoRA where it was made (path_initial_model_for_weight_conversion of PEFT's "
            "save_pretrained, for pissa, olora and corda)")


def read_lora_settings(file: str | None) -> dict:
    """The settings of this file for PEFT's LoraConfig, without defaults; empty without a file. Raises UserError for one
    that can't be read, and for what is no LoRA or can't be trained exactly."""
    if file is None:
        return {}
    where = f"--peft_config {file}"
    found = read_mapping(file, where, "use_rslora: true")
    if (kind := found.get("peft_type") or "LORA") != "LORA":
        raise UserError(f"{where}: peft_type is {kind}; only LORA can be trained")
    if (task := found.get("task_type") or "CAUSAL_LM") != "CAUSAL_LM":
        raise UserError(f"{where}: task_type is {task}; only CAUSAL_LM can be trained")
    return check_settings({name: value for name, value in found.items() if name not in ASIDE}, where)


def check_settings(found: dict, where: str) -> dict:
    """Those of these settings that are not PEFT's defaults, and the four that are flags. Raises UserError, which begins
    with `where`, for one that PEFT does not know, or that can't be trained exactly."""
    defaults = _defaults()
    if unknown := [str(name) for name in found if name not in defaults]:
        words = hint(unknown[0], TAKEN, dashes="")
        raise UserError(f"{where}: PEFT's LoraConfig has no {unknown[0]}{f'; {words}' * bool(words)}")
    kept = {}
    for name, value in found.items():
        if value is None or (name not in FLAGS and (value == defaults[name] or value in ({}, []))):
            continue
        if name not in TAKEN:
            raise UserError(f"{where}: {name} {WHY_NOT.get(name, NOT_EXACT)}; leave it out")
        _check_value(name, value, TAKEN[name], where)
        kept[name] = value
    return kept


def _check_value(name: str, value, limit: Limit, where: str) -> None:
    """Raises UserError for a value of a setting that is beyond its limit, or holds what is no regular expression."""
    if not limit.holds(value):
        raise UserError(f"{where}: {name} is {str(value)[:100]}; it {limit.words}")
    for expression in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
        try:
            re.compile(expression)
        except re.error as error:
            raise UserError(f"{where}: {name} has {expression!r}, which is no regular expression: {error}") from error


def check_readable(own: dict, where: str) -> None:
    """Raises UserError for an adapter, of config `own`, of a kind that this PEFT does not know, or for a setting of
    LoRA whose value PEFT can't read, or would read as another one; `where` begins the message."""
    from peft import PeftType  # slow to import

    if (kind := own.get("peft_type")) not in [*PeftType]:
        raise UserError(f"{where}: peft_type is {str(kind)[:100]}, which this release of PEFT does not know; install "
                        "a newer one, or mend it")
    defaults = _defaults() if kind == "LORA" else {}
    for name, limit in OWN.items() if defaults else ():
        value = own.get(name, defaults[name])
        unset = not value and type(defaults[name]) in (bool, type(None))  # null, [], {}
        if value != defaults[name] and not unset:
            _check_value(name, value, limit, where)


def check_trainable(own: dict, where: str) -> None:
    """Raises UserError for an adapter, of config `own`, that trains more than LoRA, or another LoRA than --peft_config
    may ask for; `where` begins the message. A setting that this PEFT does not know is one that it passes over."""
    mend = "Merge the adapter (PEFT's merge_and_unload), and name the merged model"
    if (kind := own.get("peft_type")) != "LORA":
        raise UserError(f"{where}: is a {kind} adapter; only LoRA can be trained on")
    for name, default in _defaults().items():
        value = own.get(name)
        if name in (*TAKEN, *ASIDE, *OF_STARTS) or value in (None, [], {}, default):
            continue
        merged = f". {mend}" * (name != "alora_invocation_tokens")  # which PEFT can't merge
        raise UserError(f"{where}: its {name} {WHY_NOT.get(name, NOT_EXACT)}{merged}")
    if LASTING.match(str(start := own.get("init_lora_weights"))):
        raise UserError(f"{where}: its init_lora_weights is {start!r}, by which PEFT changes the base, or freezes a "
                        f"part of the adapter, whenever it opens it. {mend}, or {AS_PLAIN}")


def check_dora(settings: dict, where: str, bf16: bool, zero_stage: int) -> None:
    """Raises UserError for DoRA where its numbers would not be exact."""
    if settings.get("use_dora") and bf16:
        raise UserError(f"{where}: use_dora divides by the norms of the base's matrices, which --bf16 rounds, so that "
                        "the policy would not start at its reference; leave --bf16 out")
    if settings.get("use_dora") and zero_stage == 3:
        raise UserError(f"{where}: use_dora reads the base's matrices outside of their layers, where stage 3 of ZeRO "
                        "has not gathered them; use a stage of 0 to 2")


def take_over(args, own: dict, whose: str) -> None:
    """Writes the settings of an adapter, `own`, that are also flags into args. Raises UserError where a flag asked for
    others; `whose` names the adapter."""
    for name, flag in FLAGS.items():
        if name not in own:
            continue
        value = own[name]
        if name == "target_modules" and not isinstance(value, str):
            value = ",".join(sorted(value))
        if getattr(args, flag) not in (value, type(args).__dataclass_fields__[flag].default):
            raise UserError(f"--{flag} {getattr(args, flag)}: {whose} has {value}; leave the flag out")
        setattr(args, flag, value)


def settings_text(own) -> str:
    """The settings of an adapter, of PEFT's config `own`, on which its log-probs depend beside its weights."""
    from peft import LoraConfig  # slow to import

    if isinstance(own, LoraConfig):
        return repr((own.r, own.lora_alpha, own.use_rslora, own.rank_pattern, own.alpha_pattern))
    return json.dumps({name: value for name, value in own.to_dict().items() if name not in ASIDE}, sort_keys=True,
                      default=sorted)  # of sets, whose order is another one in each process


def _defaults() -> dict:
    from peft import LoraConfig  # slow to import

    return {field.name: field.default_factory() if field.default is dataclasses.MISSING else field.default
            for field in dataclasses.fields(LoraConfig)}
