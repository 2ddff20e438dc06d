"""Two texts beside the weights of a checkpoint, for whoever gets it without the run: README.md, a model card as hubs
read it, and trainer_state.json, the log in the form of transformers' Trainer: of a long run means over more steps than
--logging_steps, and its logging_steps says of how many.

Both follow from run.json and metrics.jsonl alone: no times in them, so that a run that was stopped and went on leaves
the same bytes.
"""

import json
import os
import re
import shutil
import statistics
from pathlib import Path

from ..core.losses import LOSSES
from ..data.places import hub_parts, places_of
from ..data.urls import network_errors
from ..files import read_text
from ..flags.loss import loss_name
from .atomic import new_file
from .log import Log, is_evaluation, timeless
from .same_run import later_forks

FIGURE = "training.png"
MOST = 1000  # entries of trainer_state.json of training, and as many of evaluation: each checkpoint has one
OF_A_STEP = {"step", "epoch", "grad_norm", "learning_rate", "num_tokens", "skipped_steps"}  # the last one is logged
SECONDS = 3  # for the hub's word on a model
METRICS = ("loss", "rewards/accuracies", "rewards/margins", "logps_per_token/chosen", "logps_per_token/rejected")
SETTINGS = ("loss", "loss_kwargs", "sft_weight", "reference", "beta", "label_smoothing", "learning_rate",
            "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "per_device_train_batch_size",
            "gradient_accumulation_steps", "without_rows", "max_length", "use_lora", "lora_r", "lora_alpha",
            "lora_target_modules", "bf16", "seed")
RS_LORA = ("The adapter is rank-stabilised LoRA: its scale is lora_alpha / sqrt(r), as `use_rslora` in "
           "adapter_config.json says. A converter that reads lora_alpha alone scales it wrongly.")
QUANTISED = ("The adapter was trained on its base as bitsandbytes quantises it; in the words of transformers' "
             "BitsAndBytesConfig: `{}`.")


def texts(facts: dict, step: int, history: "History", base: str, peft=None) -> dict[str, str]:
    """{file name: text} of checkpoint-<step> of a run. `facts`: run.json's; `base`: name of the base model; `peft`: the
    config of the adapter, None for a whole model."""
    log = history.until(step)
    state = {"global_step": step, "max_steps": facts["steps"], "epoch": log[-1].get("epoch") if log else 0.0,
             "logging_steps": history.every, "eval_steps": history.eval_every,
             "save_steps": facts["arguments"]["save_steps"], "log_history": log}
    return {"README.md": model_card(facts, step, log, base, peft),
            "trainer_state.json": f"{json.dumps(state, indent=1)}\n"}


def add_figure(run: Path) -> None:
    """Puts the figure of a run that has ended beside the card of each checkpoint and of the merged model, and at the
    card's end. A folder that has it stays as it is: somebody may have edited the card since. It takes no space again
    where the disk can give one file several names."""
    figure = run / FIGURE
    if not figure.is_file():
        return
    for card in [*run.glob("checkpoint-*/README.md"), *run.glob("merged/README.md")]:
        if not card.with_name(FIGURE).exists():
            with new_file(card.with_name(FIGURE), shared=True) as place:
                try:
                    os.link(figure, place)
                except OSError:
                    shutil.copyfile(figure, place)
            with new_file(card, shared=True) as place:
                place.write_text(f"{read_text(card)}\n## Training\n\n![Training, step by step]({FIGURE})\n",
                                 encoding="utf-8")


class History:
    """The log that led to a checkpoint, as Trainer writes it: each evaluation; and for every `every` steps of training,
    and those left at the end, their means, with the number of updates that are done then. So the metrics of step k,
    taken before its update, are those of k + 1. Without times and memory.

    `every` is --logging_steps, or so large a multiple of it that a whole run has no more than MOST means; likewise of
    the evaluations in between those every `eval_every` steps are there. `facts`: run.json's.
    """

    def __init__(self, run: Path, facts: dict):
        given, steps = facts["arguments"], facts["steps"]
        self.log, self.eval_steps = Log(run), given["eval_steps"]
        self.every, self.eval_every = (every * -(-steps // (every * MOST)) if every else 0
                                       for every in (given["logging_steps"], self.eval_steps))
        self.waiting, self.found, self.window, self.steps_per_epoch = [], [], [], None
        # Whether a step so far had a gradient and a learning rate above 0. Without weight in its rows it has none.
        self.has_updates = False

    def until(self, step: int) -> list[dict]:
        """The log of checkpoint-<step>; empty for checkpoint-0, which is written first. Steps must be asked for in
        order: each reads on from where the one before has stopped."""
        if not step:
            return []
        lines = self.waiting + [timeless(line) for _, line in self.log.new_lines()]
        self.waiting = []
        for line in lines:
            if line["step"] < step + is_evaluation(line):
                self._add(line)
            else:
                self.waiting.append(line)
        rest = [_mean(self.window)] if self.window and self.window[-1]["step"] == step - 1 else []
        found = [line for line in [*self.found, *rest] if not is_evaluation(line) or self._stays(line, step)]
        of_epoch = self.steps_per_epoch
        found = [line if is_evaluation(line) else line | {"epoch": line["step"] / of_epoch if of_epoch else None}
                 for line in found]
        return sorted(found, key=lambda line: (line["step"], is_evaluation(line)))

    def _add(self, line: dict) -> None:
        if line.get("epoch") and not self.steps_per_epoch:
            self.steps_per_epoch = round(line["step"] / line["epoch"])
        if is_evaluation(line):
            self.found.append(line)
            return
        self.has_updates |= line.get("grad_norm", 0) > 0 and line.get("learning_rate", 0) > 0
        self.window.append(line)
        if (line["step"] + 1) % self.every == 0:
            self.found.append(_mean(self.window))
            self.window = []

    def _stays(self, line: dict, step: int) -> bool:
        return self.eval_every == self.eval_steps or line["step"] % self.eval_every == 0 or line["step"] == step


def _mean(lines: list[dict]) -> dict:
    """These steps of training as one entry: of each metric that is a mean over a step's pairs, the mean over the steps
    that have it; of OF_A_STEP the last step's values."""
    names = {name for line in lines for name in line} - OF_A_STEP
    means = {name: statistics.fmean(line[name] for line in lines if name in line) for name in sorted(names)}
    return lines[-1] | means | {"step": lines[-1]["step"] + 1}


def model_card(facts: dict, step: int, log: list[dict], base: str, peft=None) -> str:
    """Markdown with a YAML head. Folders of this machine are named by their last part."""
    given = facts["arguments"]
    loss, data = loss_name(given["loss"]), [given["train_file_path"], given["eval_file_path"] or ""]
    data = [hub_parts(place)[0] for path in data for place in places_of(path)]
    base = hub_parts(base)[0] if _is_hub_id(hub_parts(base)[0]) else base
    head = {"base_model": base if _is_hub_id(base) else None, "library_name": "peft" if peft else "transformers",
            "pipeline_tag": "text-generation", "license": facts.get("license"),
            "tags": ["nanodpo", loss] + ["lora"] * bool(peft),
            "datasets": sorted({name for name in data if _is_hub_id(name)}) or None}
    what = "an adapter" if peft else "a model"
    text = [f"# {_short(base)}, {loss}, step {step} of {facts['steps']}",
            f"This is {what} from a run of nanodpo: {_short(base)} after {step} of {facts['steps']} updates with the "
            f"`{loss}` loss.", *([RS_LORA] if getattr(peft, "use_rslora", False) else []),
            *_forked(facts, step),
            *([QUANTISED.format(json.dumps(how))] if peft and (how := facts.get("quantisation")) else []),
            "## Data", *(which + _short_report(report) for which, report in zip(("- ", "- held out: "),
                                                                                facts["data_report"]))]
    held_out = [line for line in log if is_evaluation(line)]
    if held_out:
        first, last = held_out[0], held_out[-1]
        rows = [f"| {name} | {first[f'eval_{name}']:.4f} | {last[f'eval_{name}']:.4f} |" for name in METRICS
                if f"eval_{name}" in first and f"eval_{name}" in last]
        text += ["## Held-out data", "\n".join([f"| | step {first['step']} | step {last['step']} |", "|---|---|---|",
                                                *rows]),
                 "Log-probabilities are in nats, means over pairs; `trainer_state.json` has more of the log."]
    given = given | {"reference": given.get("reference") and _short(given["reference"])}
    settings = [f"| {name} | {_cell(given[name])} |" for name in SETTINGS if given.get(name) not in (None, "")]
    made = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    text += ["## Settings", "\n".join(["| | |", "|---|---|", *settings]),
             f"{facts['world_size']} process(es), {facts['device']}; {made}."]
    if paper := _paper(loss):
        text += ["## Citation", f"The loss is that of [arXiv {paper}](https://arxiv.org/abs/{paper})."]
    return "\n".join(["---", *_yaml(head), "---", "", "\n\n".join(text).replace("\n\n- ", "\n- "), ""])


def _cell(value) -> str:
    """A value as a cell of a table, of which a bar or an end of line would make another: a regular expression has bars.
    """
    return " ".join(str(value).split()).replace("|", "\\|")


def _forked(facts: dict, step: int) -> list[str]:
    """A sentence on the settings that were changed before this step, where the run is a fork."""
    found = []
    for fork in later_forks(facts.get("fork")):
        pairs = [(name.removeprefix("--"), pair) for name, pair in fork["changed"].items() if name.startswith("--")]
        words = ", ".join(f"`{name}` {was} -> {now}" for name, (was, now) in pairs if name in SETTINGS)
        if words and fork["step"] < step:
            found.insert(0, f"at step {fork['step']} {words}")
    return [f"Settings were changed on the way: {'; '.join(found)}. Those below are the last."] if found else []


def license_of(base: str) -> str | None:
    """The license that the base model's own card states: the card in its folder, or of a hub id in the hub's cache, or
    else what the hub says within seconds. None where nothing is known."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # slow to import

    name, revision = (part or None for part in hub_parts(base)[:2])
    try:
        if Path(base).is_dir():
            return _license_in(read_text(Path(base) / "README.md"))
        if isinstance(card := try_to_load_from_cache(name, "README.md", revision=revision), str):
            return _license_in(read_text(card))
        found = HfApi().model_info(name, revision=revision, timeout=SECONDS).card_data
        return found and found.license
    except (TypeError, *network_errors()):  # no card; no network, or not the hub behind it
        return None


def _license_in(card: str) -> str | None:
    head = card.split("---")[1] if card.startswith("---") and card.count("---") > 1 else ""
    found = re.search(r"""^license: *(["']?)([\w.-]+)\1 *$""", head, re.MULTILINE)
    return found and found[2]


def _yaml(head: dict) -> list[str]:
    """JSON strings are YAML strings."""
    return [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items() if value]


def _paper(loss: str) -> str | None:
    """The number on arXiv of the paper that a loss is from; None for a function of the user's own."""
    found = re.search(r"arXiv\s+(\d{4}\.\d{5})", LOSSES[loss].__doc__ or "") if loss in LOSSES else None
    return found and found[1]


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists() and not name.startswith(".")


def _short(names: str) -> str:
    """These names in one line, those of files and folders of this machine by their last part."""
    found = [name if _is_hub_id(hub_parts(name)[0]) else Path(name).name for name in places_of(names)]
    return " ".join(",".join(found).split())


def _short_report(report: str) -> str:
    """A data set's report in one line, without the folder of its file."""
    first, *rest = (line.strip() for line in report.splitlines())
    part, path, said = re.fullmatch(r"data (\d+ rows of )?(.*)(: .*)", first).groups(default="")
    return "; ".join([f"{part}{_short(path)}{said}", *rest])
