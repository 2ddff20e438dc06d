"""A fork: a new run that goes on from a state of another run, its source, with some settings changed.

The fork's folder is made as if it were the source's, stopped at that step: it gets the lines of metrics.jsonl before
the step, the checkpoints up to it, and the state. From there on it is a run like any other, stopped and gone on with as
every run is, and the source is not needed any more. A fork at step 0 needs nothing but the source's settings; a source
whose first steps had others, since it is a fork itself, has no step 0.

At a later step only those settings can be changed that the steps before did not depend on. What they are changed to
holds from that step on: of a longer run, too, only the steps to come have other learning rates.
"""

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

from ..errors import UserError
from ..flags.arguments import BY_CONTENT
from ..ranks.distributed import is_main
from . import record, resume, same_run
from .atomic import BESIDE, aside, new_file, saved_steps, writing
from .elastic import DEFAULTS, arguments_of, zero_alone
from .log import read_lines
from .same_run import changed_weights, forks_of, later_forks

# What a run can have anew from a step on: flags, and entries of run.json that follow from them.
CHANGEABLE = {f"--{name}" for name in (
    "without_rows loss beta label_smoothing loss_kwargs sft_weight reference max_steps num_train_epochs "
    "learning_rate lr_scheduler_type warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "eval_steps save_steps per_device_eval_batch_size use_flash_attention").split()} | {
        "steps", "reference", "loss_function"}
# What a process was told of itself alone.
OWN = ("output_dir", "resume", "local_rank", "fork", "inspect", "inspect_row", "dry_run", "print_config")


@dataclasses.dataclass
class Fork:
    """A step of another run, as --fork names it."""

    run: Path  # the source's folder, its full path
    step: int
    source: dict | None  # the source's run.json; None where the fork's own folder is there, and has all that it needs

    def __str__(self) -> str:
        return f"--fork {self.run}@{self.step}"


def owners(record: dict) -> list[str]:
    """The fingerprints of a run, by its run.json, and of those that it is a fork of: whose states and checkpoints its
    folder may hold."""
    return [same_run.fingerprint(record), *(one["fingerprint"] for one in forks_of(record.get("fork")))]


def changed_on_the_way(entry: dict | None) -> dict | None:
    """The last fork, of those that made a run, before which its steps had other settings than it has now, by the entry
    `fork` of its run.json; None where its weights are those that its settings give from step 0 on."""
    return next(filter(changed_weights, later_forks(entry)), None)


def settings_of(fork: str, output_dir: str | None) -> tuple[dict, str]:
    """(the settings that are the defaults of a fork's flags, the file that they come from): the source's, which the
    fork's own run.json has, too. Raises UserError."""
    found = find(fork, Path(output_dir) if output_dir else None)
    folder = found.run if found.source else Path(output_dir)
    own, file = found.source or record.read(folder), folder / "run.json"
    was = {} if found.source else {name: before for name, (before, _) in own["fork"]["changed"].items()}
    settings = arguments_of(own) | {name.removeprefix("--"): was[name] for name in was if name.startswith("--")}
    if unknown := settings.keys() - DEFAULTS.keys():
        raise UserError(f"--fork {fork}: {file} is of another version of nanodpo, which has the settings "
                        f"{', '.join(sorted(unknown))}; fork it with that version")
    # An adapter that was trained on, whose hash is the third, still has its settings, and some that no flag may have.
    its = same_run.ADAPTER if len(str(was.get("weights", own.get("weights"))).split()) > 2 else ()
    return {name: value for name, value in settings.items() if name not in {*OWN, *its}}, str(file)


def find(fork: str, folder: Path | None) -> Fork:
    """Finds the run and step of --fork; `folder` is the fork's own, which may be there already. Raises UserError for
    what is no run, a step at which it can't be forked, and a folder that holds another run."""
    place, at, step = fork.rpartition("@")
    run = Path(os.path.abspath(os.path.expanduser(place if at else fork)))
    if folder and (folder / "run.json").is_file():
        own = record.read(folder).get("fork") or {}
        if at and str(own.get("step")) == step and (own.get("run") == str(run) or _is_run(run, own.get("fingerprint"))):
            return Fork(run, int(step), None)
        what = "the run that is to be forked" if os.path.realpath(folder) == os.path.realpath(run) else "another run"
        raise UserError(f"--output_dir {folder}: holds {what}; name a new folder for the fork")
    if not (run / "run.json").is_file():
        raise UserError(f"--fork {fork}: {run} is no run (run.json is missing)")
    source = record.read(run)
    changed = changed_on_the_way(source.get("fork"))
    there = [*[0] * (changed is None), *sorted(resume.steps_in(run))]
    if not at or step not in map(str, there):
        said = f"there is no state of step {step}" if at else "must be RUN@STEP"
        if changed:
            said += f" (its steps before {changed['step']} are those of {changed['run']}, which had other settings)"
        can = f"can be forked at step {listed(there)}" if there else "can't be forked"
        more = "" if len(there) > 1 else "; a run with --keep_states and --resume_steps or --save_steps has more"
        raise UserError(f"--fork {fork}: {said}; {run} {can}{more}")
    return Fork(run, int(step), source)


def _is_run(folder: Path, fingerprint: str) -> bool:
    """Whether there is a run in the folder that has this fingerprint: on another machine its folder may have another
    name."""
    return (folder / "run.json").is_file() and same_run.fingerprint(record.read(folder)) == fingerprint


def listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 20 else f"{listed(steps[:10])} ... {listed(steps[-5:])}"


def entry(fork: Fork | None, old: dict | None) -> dict | None:
    """The entry of run.json: the source's folder, the step, a hash of what makes the source that run, what is changed,
    which is filled in when all is known, and of a source that is a fork itself this entry. `old`: the fork's own
    run.json. Raises UserError where the state is not whole."""
    if fork is None or old:
        return fork and old["fork"]
    if fork.step and is_main():
        state = resume.state(fork.run, fork.step, read_lines(fork.run), owners(fork.source))
        if isinstance(state, str):
            raise UserError(f"{fork}: the run can't go on from this state: {state}")
    return {"run": str(fork.run), "step": fork.step, "fingerprint": same_run.fingerprint(fork.source), "changed": {},
            "of": fork.source.get("fork")}


def check(fork: Fork, facts: dict, before_loading: bool = False) -> dict[str, list]:
    """{name: [value in the source, value in the fork]} of what is changed; `facts` are the entries of run.json that are
    known. Raises UserError for what can't be changed at this step, and a run that ends before it."""
    different = [line for line in same_run.differences(fork.source, facts, before_loading) if not _is_own(*line)]
    fixed = [(name, was, now) for name, was, now in different if name not in CHANGEABLE and not (
        name == "deepspeed" and zero_alone(was, now))]
    found = [one for one in fixed if one[0].removeprefix("--") not in BY_CONTENT]
    if fork.step and found:
        what = f"steps before {fork.step}"
        if all(_of_evaluation(*one) for one in found):
            what = f"evaluations before {fork.step}, which the fork takes over,"
        raise UserError(f"{fork}: the {what} could have been others with {same_run.in_words(fixed)}; leave it as it "
                        "was, or fork at 0, where everything can be changed")
    if facts.get("steps", fork.step + 1) <= fork.step:
        raise UserError(f"{fork}: the fork would end at step {facts['steps']}; give it more --max_steps")
    return {name: [was, now] for name, was, now in different}


def first_step_with(name: str, facts: dict) -> int:
    """The step from which on a setting, like --beta, has the value that it has now; `facts` are the entries of
    run.json."""
    return next((entry["step"] for entry in later_forks(facts.get("fork")) if name in entry["changed"]), 0)


def _of_evaluation(name: str, was, now) -> bool:
    """Whether a difference is of what is evaluated alone; of the data the first is what is trained on."""
    return name == "--eval_split" or name == "data" and bool(was) and was[:1] == now[:1]


def _is_own(name: str, was, now) -> bool:
    """Whether a difference is none of the settings: that this is a fork, and what DeepSpeed is told of --max_grad_norm.
    """
    clipping = {"gradient_clipping": None}
    return name == "fork" or name == "deepspeed" and isinstance(was, dict) and was | clipping == now | clipping


def fill(fork: Fork, folder: Path) -> None:
    """Puts into the fork's folder what the source had at this step, unless it is there. On one rank.

    Files are links, so that they take no room and stay when the source is removed; those that people edit, and all of
    them where the file system has no links, are copies. metrics.jsonl comes last: with it all is there.
    """
    if not fork.step or (folder / "metrics.jsonl").exists():
        return
    if not resume.folder_of(fork.run, fork.step).is_dir():
        raise UserError(f"{fork}: the state is gone, and {folder} was stopped before it had it; remove that folder")
    (folder / "resume").mkdir(exist_ok=True)
    for name in [*(f"checkpoint-{k}" for k in saved_steps(fork.run) if 0 < k <= fork.step), f"resume/step-{fork.step}"]:
        with writing(folder / name):
            if not (folder / name).exists():
                shutil.copytree(fork.run / name, aside(folder / name), copy_function=_link)
                os.rename(aside(folder / name), folder / name)
    before = [text for text, line in read_lines(fork.run) if line["step"] < fork.step]
    with writing(folder / "metrics.jsonl"), new_file(folder / "metrics.jsonl") as place:
        place.write_text("".join(before), encoding="utf-8")


def _link(file: str, place: str) -> None:
    with contextlib.suppress(OSError):
        if Path(file).name not in BESIDE:
            return os.link(file, place)
    shutil.copy2(file, place)
