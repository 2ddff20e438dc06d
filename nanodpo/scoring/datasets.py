"""Reads the data sets that are scored, as the runs read theirs, and gives them their responses."""

import dataclasses
import functools
import itertools
import json

from ..data.example import Example
from ..data.limits import longest_allowed
from ..data.marks import token_text
from ..data.template import Template, template_for
from ..data.tokens import DataSet, load_dataset
from ..data.transcripts import prompt_leads
from ..errors import UserError
from ..folder.reference import data_hash
from ..model.source import Source, base_of, check_heads, check_ids, check_weight_files, open_source
from ..ranks.distributed import say
from ..screen import folded
from .answers import final_answer, thinks
from .contents import hash_of
from .recorded import READING
from .responses import GREEDY, KINDS, Group, make_groups, one_a_row
from .runs import Checkpoint, check_own, own_rows, without_references


@dataclasses.dataclass
class Wanted:
    """The flags that say what is scored of every data set."""

    responses: list[str] | None  # kinds; None: those of KINDS that the data have
    seed: int  # of drawn and shuffled responses
    answers: int  # rows that each checkpoint answers
    max_new_tokens: int | None  # of a greedy answer; None: as many as the longest chosen response has


@dataclasses.dataclass
class ResponseSet:
    """A data set with the responses that are scored: groups[i] belongs to examples[i]."""

    name: str
    examples: list[Example]
    asked: list[str]  # kinds of responses
    kinds: list[str]  # these, and those that an earlier scoring may have left
    groups: list[Group]
    template: Template
    limit: int  # tokens of prompt and response
    answer_limit: int  # tokens of a greedy answer
    vocabulary: int  # of the model: how many tokens it gives a probability
    questions: dict[int, int] = dataclasses.field(default_factory=dict)  # {row: index} that each checkpoint answers
    found: dict = dataclasses.field(default_factory=dict)  # what rows_with has found

    def key_of(self, i: int) -> dict:
        """The columns that tell an example from others in the tables."""
        return {"row": self.examples[i].row, "problem": self.examples[i].problem}

    def expected(self, i: int) -> tuple[str, bool] | None:
        """(the answer in an example's chosen response, whether it marks its thinking); None where the response is cut,
        or ends in no answer."""
        chosen = self.template.tokenizer.decode(self.examples[i].chosen)
        answer = None if self.examples[i].cut[0] else final_answer(chosen)
        return None if answer is None else (answer, thinks(chosen))

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        tokenizer = self.template.tokenizer
        return sorted({*tokenizer(self.template.end, add_special_tokens=False).input_ids[-1:], tokenizer.eos_token_id}
                      - {None})

    @functools.cached_property
    def token_texts(self):
        """A function of token ids: their texts, of a token by itself."""
        text = functools.lru_cache(None)(functools.partial(token_text, self.template.tokenizer))
        return lambda ids: [*map(text, ids)]

    def add_greedy(self, answers: list[list[int]]) -> None:
        """Puts the first checkpoint's own answer to each example among its responses."""
        self.kinds = list(dict.fromkeys([*self.kinds, GREEDY]))
        both = [(prompt, responses | {GREEDY: ids}) for (prompt, responses), ids in zip(self.groups, answers)]
        self.groups = [(prompt, {kind: responses[kind] for kind in self.kinds if responses.get(kind)})
                       for prompt, responses in both]

    @property
    def hash(self) -> str:
        """A hash of all that is scored, and of how it is read."""
        keys = [self.key_of(i) for i in range(len(self.examples))]
        return hash_of([self.limit, self.asked, self.kinds, self.groups, keys])

    @functools.cached_property
    def prompts_hash(self) -> str:
        """A hash of all prompts and of the numbers of their rows."""
        return hash_of([[example.row, example.prompt] for example in self.examples])

    def rows_with(self, kinds: tuple[str, ...]) -> tuple[dict[int, int], str]:
        """({row: index} of the examples that have one of these responses, a hash of their prompts and token ids)."""
        if kinds not in self.found:
            here = [{kind: responses[kind] for kind in kinds if kind in responses} for _, responses in self.groups]
            rows = {example.row: i for i, example in enumerate(self.examples) if here[i]}
            self.found[kinds] = rows, hash_of([[row, self.examples[i].problem, self.groups[i][0], here[i]]
                                               for row, i in rows.items()])
        return self.found[kinds]


class Reader:
    """Reads a file as the settings of a run say, once for each way of reading it; `rows` are those to keep, or all."""

    def __init__(self, path: str, source: Source, rows: set[int]):
        self.path, self.source, self.rows, self.known = path, source, rows, {}

    def read(self, settings, columns: tuple[str, ...] = ()) -> tuple[DataSet, Template]:
        """`columns`: further ones with responses."""
        how = repr([getattr(settings, name) for name in ("loss", "date", "train_on", *READING)] + [columns])
        if how not in self.known:
            template = template_for(self.source.tokenizer, settings, settings.date)
            data = load_dataset(self.path, template, settings, self.limit(settings), pairs=False, more=columns)
            check_ids(self.source, self.path, data.examples)
            if self.rows:
                data.rows_in_file, data.rows_held_out = data.rows, len(self.rows)
                data.examples = [example for example in data.examples if example.row in self.rows]
            self.known[how] = data, template
        return self.known[how]

    def limit(self, settings) -> int:
        """Tokens of prompt and response."""
        return longest_allowed(settings.max_length, self.source.context)


def open_datasets(checkpoints: list[Checkpoint], files: list[tuple[str, str]], own: bool, wanted: Wanted,
                  other_prompts: bool, ranks: int) -> list[ResponseSet]:
    """Reads the files, (name, file) each, as the first checkpoint's run did, and says so where another run had other
    settings. `own`: the file is the runs' own; `other_prompts`: prompts may open as none did in training; `ranks`: so
    many share a micro-batch.

    Raises UserError for what can't be read, for runs with other data of their own, for other tokenizers, and for models
    whose heads the ranks can't share.
    """
    if own:
        check_own(without_references(checkpoints))
    source, first = one_source(checkpoints, ranks), checkpoints[0]
    if other := [f"--{name}" for name in READING
                 if len({getattr(known.settings, name) for known in checkpoints if known.phase}) > 1]:
        say(f"data are read as {first.run} read them; other runs had their own {', '.join(other)}")
    rows = set(own_rows(first.settings)[2]) if own else set()
    readers = [(name, Reader(file, source, rows)) for name, file in files]
    if own:
        check_unchanged(without_references(checkpoints), readers[0][1])
    datasets = [open_dataset(name, reader, first.settings, wanted) for name, reader in readers]
    if not other_prompts:
        for data in datasets:
            check_leads(checkpoints, data)
    return datasets


def one_source(checkpoints: list[Checkpoint], ranks: int) -> Source:
    """The first checkpoint's tokenizer and limits. Tokenizers may lie in many folders, but they must say the same:
    log-probs of other tokens don't compare. Raises UserError where they don't."""
    found, seen = {}, set()
    for checkpoint in checkpoints:
        base, adapter = base_of(checkpoint.path)
        how = (base if adapter else None, checkpoint.contents.settings_key, checkpoint.settings.assistant_header)
        if how in seen:  # those of one run have the same files beside their weights
            check_weight_files(checkpoint.path)
            continue
        seen.add(how)
        source = open_source(checkpoint.path, checkpoint.settings.trust_remote_code)
        check_heads(source.config, ranks, checkpoint.path)
        tokenizer, header = source.tokenizer, checkpoint.settings.assistant_header
        spoken = json.dumps([tokenizer.chat_template, header, sorted(tokenizer.get_vocab().items())])
        found.setdefault(spoken, (checkpoint.path, source))
    if len(found) > 1:
        first, second = (path for path, _ in list(found.values())[:2])
        raise UserError(f"{first} and {second} have different tokenizers or chat templates; score them in two calls")
    ((_, source),) = found.values()
    return source


def check_unchanged(checkpoints: list[Checkpoint], reader: Reader) -> None:
    """Raises UserError where the data that runs call their own are no longer those that they read: rows that a run held
    out may be rows now that it was trained on."""
    for run, settings in {c.run: c.recorded for c in checkpoints if c.phase}.items():
        name, path, _ = own_rows(settings)
        if not (known := settings.record.get("data")):
            say(f"{run}: run.json has no hash of its data; {path} is taken as it is")
        elif data_hash(reader.read(settings)[0].examples) != known[-1]:
            raise UserError(f"{path}: has changed since run {run} read it, so the rows called {name} are others now; "
                            "put the file back, or name data with --dataset_path")


def open_dataset(name: str, reader: Reader, settings, wanted: Wanted) -> ResponseSet:
    """A data set as the settings of a run read it, with its responses."""
    columns = tuple(kind for kind in wanted.responses or () if kind not in KINDS and kind != GREEDY)
    read, template = reader.read(settings, columns)
    examples, limit = [example.last_answer() for example in read.examples], reader.limit(settings)
    several = len({alone.row for alone, example in zip(examples, read.examples) if alone is not example})
    examples, further = one_a_row(examples)
    there = [kind for kind, make in KINDS.items() if any(make(examples, i, wanted.seed) for i in range(len(examples)))]
    asked = wanted.responses or there
    asked = [*asked, *(name for name in further if name.partition("[")[0] in asked)]
    say(folded(read.report()))
    if further:
        say(f"{name}: of rows with lists of answers the first ones are chosen and rejected, and a pair; further ones "
            f"are scored as {', '.join(further[:4])}{' ...' * (len(further) > 4)}")
    if several:
        # Responses of other kinds answer the last question, too.
        say(f"{name}: {several} of {len(examples)} rows have several answers; the run was trained on all of them "
            "(--train_on all), and the last one is scored, after all that is before it")
    kinds = [*asked, *(kind for kind in there if kind not in asked)]
    groups = make_groups(examples, kinds, wanted.seed, limit)
    longest = wanted.max_new_tokens or max(len(example.chosen) for example in examples)
    vocabulary = reader.source.config.get_text_config().vocab_size
    data = ResponseSet(name, examples, asked, kinds, groups, template, limit, longest, vocabulary)
    known = (i for i in range(len(examples)) if data.expected(i))
    data.questions = {examples[i].row: i for i in itertools.islice(known, wanted.answers)}
    if len(data.questions) < min(wanted.answers, len(examples)):
        say(f"{name}: {len(data.questions)} of {len(examples)} chosen responses are whole and end in an answer that "
            "can be checked")
    return data


def check_leads(checkpoints: list[Checkpoint], data: ResponseSet) -> None:
    """Raises UserError for prompts that open differently from those of a checkpoint's run."""
    found = prompt_leads(data.template, (example.prompt for example in data.examples))
    for run, known in {c.run: c.settings.prompt_leads for c in checkpoints if c.settings.prompt_leads}.items():
        seen = {*known}
        if new := [lead for lead in found if lead not in seen]:
            here, there = (repr(lead) if lead is not None else "no user's turn" for lead in (new[0], known[0]))
            raise UserError(f"data set {data.name}: a prompt opens with {here}, and run {run} was trained on {there}; "
                            "--other_prompts scores it all the same")
