"""The models that a run needs: opened and checked against the settings before anything is loaded, then loaded."""

from pathlib import Path

from ..data.tokens import DataSet
from ..errors import UserError
from ..folder import record
from ..folder.atomic import check_whole
from ..model import loading
from ..model.adapters import adapter_shape
from ..model.lora_settings import check_dora, check_readable, check_trainable, read_lora_settings, take_over
from ..model.quantised import QUANTISATION, bits_of, check_quantised
from ..model.sharding import is_sharded, shared_weights, stage_of
from ..model.source import Source, base_of, check_heads, check_reference, open_source, read_template_file
from ..ranks import distributed
from . import agreement


def say_other_bits(args, adapter: str | None) -> None:
    """A line where a checkpoint is trained on whose run had its base in other bits."""
    folder = Path(adapter or "").parent
    if adapter and (folder / "run.json").is_file():
        before = record.read(folder)["arguments"]
        for name in ("load_in_4bit", "load_in_8bit"):
            if bool(before.get(name)) != getattr(args, name):
                distributed.say(f"{adapter}: was trained with{'' if before.get(name) else 'out'} --{name}; here its "
                                "base is another one")


def read_lora(args) -> dict:
    """The settings of --peft_config; those that are flags, too, are written into args. Raises UserError."""
    lora = read_lora_settings(args.peft_config)
    take_over(args, lora, f"--peft_config {args.peft_config}")
    if lora.get("lora_dropout") and not args.allow_dropout:
        raise UserError(f"--peft_config {args.peft_config}: lora_dropout {args.lora_dropout} makes policy and "
                        "reference differ at step 0; add --allow_dropout to train with it all the same, or set it to 0")
    return lora


def check_lora(args, lora: dict, source: Source, stage: int) -> None:
    """Raises UserError for settings of LoRA that go with no adapter of its own, or not with the precision or ZeRO."""
    check_dora(lora, f"--peft_config {args.peft_config}", args.bf16, stage)
    if not source.adapter:
        return
    if args.peft_config:
        raise UserError(f"--peft_config {args.peft_config}: --model_name {args.model_name} is an adapter, which has "
                        "settings of its own; leave it out")
    own = adapter_shape(source.adapter)
    check_trainable(own, f"--model_name {args.model_name}")
    check_readable(own, f"--model_name {args.model_name}: adapter_config.json")
    check_dora(own, f"--model_name {args.model_name}", args.bf16, stage)


def open_whole(name: str, trust_remote_code: bool) -> Source:
    """A model or adapter; a checkpoint of another run must be what that run wrote."""
    for place in filter(None, base_of(name)):
        check_whole(Path(place))
    return open_source(name, trust_remote_code)


def open_checked(args, lora: dict, deepspeed: dict) -> tuple[Source, dict | None]:
    """(the model or adapter to start from, with the chat template of --chat_template; how the matrices of its base are
    quantised, None where they are not). Raises UserError where it can't be trained so."""
    source, stage, bits = open_whole(args.model_name, args.trust_remote_code), stage_of(deepspeed), bits_of(args)
    if args.chat_template:
        source.tokenizer.chat_template = read_template_file(args.chat_template)
    check_quantised(bits, source.stored, source.base, args.use_lora, stage)
    check_lora(args, lora, source, stage)
    check_heads(source.config, args.sequence_parallel_size, f"--model_name {args.model_name}")
    return source, source.stored or QUANTISATION.get(bits)


def open_reference(args, source: Source, sets: list[DataSet]) -> Source:
    """The model or adapter of --reference. Raises UserError where it can't read the token ids of these data sets."""
    reference = open_whole(args.reference, args.trust_remote_code)
    check_quantised(bits_of(args), reference.stored, reference.base)
    check_heads(reference.config, args.sequence_parallel_size, f"--reference {args.reference}")
    for data in sets:
        check_reference(source, reference, args.reference, data.path, data.examples)
    return reference


def _by_part(hashes: str, name: str, where: str = "") -> dict:
    """The hashes of loading.weights_hash as agreement.py compares them, each by what it is of: ranks that differ in a
    config alone are not told that their weights have one hash. `name`: of the model, for the message."""
    parts = ("weights that hash to", "a config that hashes to", "an adapter that hashes to")
    return {f"{where}{part}": (digest, f"{digest[:8]} ({name})") for part, digest in zip(parts, hashes.split())}


def load_models(start) -> tuple:
    """A run's Start -> (the policy, its hashes as the reference, the model of --reference, its hashes); see
    model/loading.py. Raises UserError where the ranks have read other weights."""
    args, shared = start.args, shared_weights(start.deepspeed)
    fresh = args.use_lora and not start.source.adapter
    with agreement.same_on_all_ranks() as compared:
        model = loading.load_model(start.source, args, start.lora, shared)
        weights = loading.weights_hash(model, fresh, as_read=True)
        compared |= _by_part(weights, args.model_name)
        other = loading.load_reference(start.reference, start.adapter_off, args, shared)
        its_weights = loading.weights_hash(other, False, as_read=True) if other else None
        compared |= _by_part(its_weights or "", args.reference, "for --reference ")
    if is_sharded(model):  # all ranks have all of it, together: the hash that a run has without ZeRO
        weights = loading.weights_hash(model, fresh)
        its_weights = loading.weights_hash(other, False) if other else None
    if start.reference and start.adapter_off:
        its_weights = " ".join(weights.split()[:2])  # of the base and its config, without an adapter
    return model, weights, other, its_weights
