"""Whether two run.json are of the same run, in what they differ, and whether seeds alone tell them apart."""

import hashlib
import itertools
import json
import shlex
from pathlib import Path

from ..errors import UserError
from ..flags.arguments import BY_CONTENT
from ..flags.loss import own_function
from .elastic import DEFAULTS, SHARING, arguments_of, pairs_per_step, zero_alone

# Flags that may differ between a run and its continuation, since they change no number (deterministic does, in the last
# bits, and that is said) ...
FREE = {"output_dir", "cache_dir", "local_rank", "logging_steps", "resume", "resume_steps", "save_total_limit", "draw",
        "skip_nonfinite", "merge_weights", "trust_remote_code", "inspect", "inspect_row", "print_config", "dry_run",
        "gradient_checkpointing", "activation_memory", "report_to", "keep_states", "fork", "deterministic"}
# ... or, as those of BY_CONTENT, since the content of what they name is compared: weights, token ids, settings.
# An adapter that is trained on has settings of its own, which are known only when it is loaded.
ADAPTER = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}
# Flags that change no weight of a run, and nothing of what it says of them at a step.
KEEPING = {"eval_steps", "save_steps", "per_device_eval_batch_size"}
# The machine may be another one for the continuation; the run says so, since its last bits may then differ.
MACHINE = ("versions", "git_commit", "device", "threads")
COMPARED = ("arguments", "world_size", "steps", "max_length", "data", "deepspeed", "weights", "reference",
            "peft_config", "loss_function", "layout", "attention", "fork")
FILES = {"data", "weights", "reference", "loss_function"}  # of these, hashes of what the user's files hold
EMPTY = (("", None), (None, ""))  # values of a flag that are no difference: an empty text stands for none


def check_same(folder: Path, old: dict, new: dict, before_loading: bool = False) -> None:
    """Raises UserError that lists every difference between run.json in this folder, `old`, and this run, `new`, that
    makes another run of it; ZeRO's settings do not.

    `new` may lack entries that are not known yet. `before_loading`: an adapter to train on is not loaded, so its
    settings are not compared.
    """
    different = differences(old, new, before_loading)
    names = {name for name, was, now in different if not (name == "deepspeed" and zero_alone(was, now))}
    if names - {f"--{name}" for name in BY_CONTENT}:
        changes = in_words([one for one in different if one[0] in names])
        advice = "give it the same ones to go on with it, or name a new folder"
        if names <= {"--max_steps", "--num_train_epochs", "steps"} and old.get("finished"):
            last = folder / f"checkpoint-{old['steps']}"
            advice = ("it is finished, and in a longer run each step has another learning rate. To train further, "
                      f"start from its end in a new --output_dir: --model_name {shlex.quote(str(last))} (for DPO that "
                      "is then the reference, too, unless --reference names another); for one longer run, name a new "
                      "--output_dir alone")
        elif "weights" in names and _has_moved(old, new):
            advice = f"the hub has other weights by now: give it --model_name {old['base']}, or name a new folder"
        elif old.get("finished") and names.isdisjoint(FILES) and not any(name[0] == "-" for name in names):
            advice = "it is finished; name a new folder"
        elif (commit := old.get("git_commit")) != new.get("git_commit") and not any(name[0] == "-" for name in names):
            advice = "put back what has changed; if nothing has, " * (not names.isdisjoint(FILES))
            advice += f"go on with the version of nanodpo that began it, commit {commit}, or name a new folder"
        raise UserError(f"--output_dir {folder}: holds a run with other settings ({changes}); {advice}")


def _has_moved(old: dict, new: dict) -> bool:
    """Whether the run's --model_name is an id on the hub, of which its cache had another commit then."""
    name, _, revision = str(old.get("base")).partition("@")
    return bool(revision) and name == old["arguments"]["model_name"] and old["base"] != new.get("base")


def differences(old: dict, new: dict, before_loading: bool = False) -> list[tuple]:
    """(name, value in `old`, value in `new`) of what makes two runs different ones: flags as --name, then what was read
    and found, then, where there is any such difference, the names of what was read. The arguments are those of
    `check_same`."""
    new = json.loads(json.dumps(new))  # tuples become lists, as in the file
    before, now = arguments_of(old), new["arguments"]
    shared = SHARING if pairs_per_step(old) == pairs_per_step(new) else set()
    free = FREE.union(BY_CONTENT, shared, ADAPTER if before_loading else (),
                      ["loss"] if _same_own_loss(old, new) else (),
                      {"train_on"} - old["arguments"].keys(),  # the hash of the data tells
                      ["num_train_epochs"] if min(before["max_steps"], now["max_steps"]) > 0 else ())  # no effect
    found = _changed(before, now, [name for name in now if name not in free], "--")
    found += _changed(old, new, [name for name in COMPARED if name in new and name not in {"arguments", *shared}])
    return found + _changed(before, now, sorted(BY_CONTENT), "--") if found else []


def _changed(was: dict, now: dict, names, dashes: str = "") -> list[tuple]:
    """(name, value before, value now) of those entries that are others now."""
    return [(dashes + name, was.get(name), now[name]) for name in names
            if was.get(name) != now[name] and (was.get(name), now[name]) not in EMPTY]


def _same_own_loss(old: dict, new: dict) -> bool:
    """Whether both have the same loss of the user's own, by the function's name and the content of its file, which may
    have another path on another machine."""
    names = [own_function(arguments_of(record)["loss"]) for record in (old, new)]
    return all(names) and names[0][1] == names[1][1] and old.get("loss_function") == new.get("loss_function")


def in_words(different: list[tuple]) -> str:
    """The entries of `differences` in words, for a message."""
    return ", ".join(f"{name}: {_short(was)} -> {_short(is_now)}"
                     for one in different for name, was, is_now in _parts(*one))


def _parts(name: str, was, now) -> list[tuple]:
    """(name, value before, value now); of two dictionaries those of their entries that are others now."""
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return [(name, was, now)]
    keys = [key for key in was | now if was.get(key) != now.get(key)]
    return [part for key in keys for part in _parts(f"{name}.{key}", was.get(key), now.get(key))]


def changed_machine(old: dict, new: dict) -> str:
    """The differences in MACHINE between two run.json, and of --deterministic on a GPU, in words, with what they may
    change; empty where there are none."""
    found = _changed(old, new, MACHINE)
    if new["device"] != "cpu":  # an earlier version's record lacks the flag
        found += _changed({"deterministic": False} | old["arguments"], new["arguments"], ["deterministic"], "--")
    what = "the last bits may differ"
    if any(name == "git_commit" for name, *_ in found):
        what = "numbers may differ, since this is another version of nanodpo"
    return f"{what}: {in_words(found)}" if found else ""


def _short(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:30]}...{text[-20:]}"


def custom(arguments: dict, free: set[str]) -> dict:
    """The settings that are neither free nor at their defaults."""
    return {name: value for name, value in arguments.items() if name not in free and value != DEFAULTS.get(name)}


def fingerprint(record: dict) -> str:
    """16 hexadecimal digits, a hash of all entries of run.json that make a run this one. A fork that changed nothing is
    the run that it goes on from."""
    if (fork := record.get("fork")) and not fork["changed"]:
        return fork["fingerprint"]
    kept = {name: record.get(name) for name in COMPARED if name not in SHARING | {"fork"}}
    kept |= {"fork": [fork["fingerprint"], fork["step"], fork["changed"]]} if fork else {}
    kept |= {"arguments": custom(record["arguments"], FREE.union(BY_CONTENT, SHARING)), "pairs": pairs_per_step(record)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def forks_of(entry: dict | None) -> list[dict]:
    """A run's entry `fork`, where it has one, then that of the run which it is a fork of, and so on."""
    return [entry, *forks_of(entry.get("of"))] if isinstance(entry, dict) else []


def later_forks(entry: dict | None) -> list[dict]:
    """Of `forks_of`, those behind the last one at step 0, which is as a run with its settings."""
    return [*itertools.takewhile(lambda fork: fork.get("step"), forks_of(entry))]


def changed_weights(fork: dict) -> dict[str, list]:
    """The settings that an entry `fork` of run.json says it changed, without KEEPING: none where its weights are those
    of its source."""
    return {name: pair for name, pair in (fork.get("changed") or {}).items() if name.removeprefix("--") not in KEEPING}


def recipe(record: dict) -> tuple[str, int | None]:
    """(everything in run.json that makes a run, but its seed, as text; the seed). Weights that the seed drew and rows
    that it held out are part of the seed."""
    given = record["arguments"]
    kept = custom(given, FREE | KEEPING | {"seed"})
    content = ["steps", "max_length", "world_size", "peft_config", *["weights"] * (not given.get("random_init")),
               *["data"] * (not given.get("eval_size"))]
    forks = [[fork["step"], changed] for fork in later_forks(record.get("fork")) if (changed := changed_weights(fork))]
    return json.dumps([kept, forks, *(record.get(name) for name in content)], sort_keys=True), given.get("seed")
