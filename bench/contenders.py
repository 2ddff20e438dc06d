"""The contenders: one model, one LoRA, one AdamW, one loss; several ways to a training step.

nanodpo is the project's own path: pack, SequenceLogProbs, the loss and metrics of a step, without DeepSpeed. `plain` is
DPO as a textbook has it: padded rows, full logits, log_softmax. `trl` is TRL's DPOTrainer at its best on this machine:
its fused chunked head, references computed beforehand where the others have theirs cached; its padding-free mode is
switched off in 1.16.

Shapes: P pairs, S = 2P sequences, T the longest. All numbers float32 unless the model says otherwise.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Pair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen, rejected
BETA, RATE = 0.1, 1e-5


@dataclasses.dataclass
class Work:
    """The model, data and settings, the same for every contender."""

    pairs: list[Pair]
    model: str | dict  # a folder, or a Qwen2 config
    cached: bool = True  # reference log-probs known beforehand
    checkpointing: str = "keep"  # or "full", for nanodpo also "offload", "by need"
    activation_memory: float = -1  # GiB, for "by need"; -1: what the GPU has left
    rank: int = 16
    batch: int = 1  # pairs in a step: one micro-batch
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    mixed: torch.dtype | None = None  # --bf16, LoRA in float32, with products in this dtype; TRL's is autocast
    spread: float = 0.02  # of the adapter's weights


def base_model(work: Work):
    """The model without LoRA, the same weights wherever it is built."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    if isinstance(work.model, str):
        return AutoModelForCausalLM.from_pretrained(work.model, dtype=work.dtype).to(work.device)
    with torch.device(work.device):  # a 7B shape is drawn where it will live
        was = torch.get_default_dtype()
        torch.set_default_dtype(work.dtype)
        try:
            return Qwen2ForCausalLM(Qwen2Config(**work.model))
        finally:
            torch.set_default_dtype(was)


def lora_config(work: Work):
    from peft import LoraConfig

    return LoraConfig(r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(work: Work):
    """The model with LoRA in its own dtype."""
    from peft import get_peft_model

    with torch.device(work.device):
        model = get_peft_model(base_model(work), lora_config(work), autocast_adapter_dtype=False)
    for p in model.parameters():  # not of the positions' frequencies, which are no parameters and stay float32
        p.data = p.data.to(work.dtype)
    return model


def draw_lora(model, spread: float) -> None:
    """The same adapter for everybody, and not LoRA's zero: a loss of ln 2 would agree with anything."""
    for k, (_, p) in enumerate(sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)):
        draw = torch.Generator(p.device).manual_seed(k)
        torch.nn.init.normal_(p, 0, spread, generator=draw)


class Contender:
    """Subclasses give `logps(pairs)`: (P, 2), summed log-probs, and `losses(pairs, ref)`: (P,); or, as Trl does, a
    `step` of their own."""

    def __init__(self, work: Work):
        self.work, self.cache = work, {}
        self.model = self.build()
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        # As in train.py's engine weights in bfloat16 have a twin in float32, and gradients go there as they come.
        self.twins = [torch.nn.Parameter(p.detach().float()) if p.dtype == torch.bfloat16 else p for p in self.trained]
        for p, twin in zip(self.trained, self.twins):
            if p is not twin:
                p.register_post_accumulate_grad_hook(functools.partial(_hand_over, twin))
        self.begin()

    def begin(self) -> None:
        """The adapter and the optimizer that every contender starts with."""
        draw_lora(self.model, self.work.spread)
        for p, twin in zip(self.trained, self.twins):
            twin.data.copy_(p.data)
        self.optimizer = torch.optim.AdamW(self.twins, lr=RATE, weight_decay=0.0, fused=True)

    def build(self):
        from nanodpo.model.recompute import Recompute

        model = adapted(self.work)
        self.recompute = Recompute(model)
        self.recompute_by(self.work.checkpointing)
        return model

    def recompute_by(self, checkpointing: str) -> None:
        """Sets what backward computes again, from the next step on: one of Work's `checkpointing`."""
        self.work.checkpointing = checkpointing
        self.recompute.use("full" if checkpointing == "full" else "keep")

    def modes(self, k: int) -> list[str]:
        """The mode of recomputation of each layer in the k-th step."""
        layers = self.model.config.get_text_config().num_hidden_layers
        return [self.work.checkpointing] * layers

    def references(self, pairs: list[Pair]):
        """(P, 2): the adapter off."""
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter():
            logps = self.logps(pairs)
        self.model.train()
        return logps

    def prepare(self) -> None:
        """The reference pass, where it is paid before training."""
        if self.work.cached:
            for k in range(self.steps):
                self.cache[k] = self.references(self.batch(k))

    @property
    def steps(self) -> int:
        return len(self.work.pairs) // self.work.batch

    def batch(self, k: int) -> list[Pair]:
        k = k % self.steps
        return self.work.pairs[k * self.work.batch : (k + 1) * self.work.batch]

    def step(self, k: int) -> tuple[float, float]:
        """One update on the k-th pairs; returns (loss, gradient norm)."""
        ref = self.cache[k % self.steps] if self.work.cached else self.references(self.batch(k))
        loss = self.losses(self.batch(k), ref).mean()
        loss.backward()
        return self.update(loss)

    def update(self, loss) -> tuple[float, float]:
        norm = torch.nn.utils.clip_grad_norm_(self.twins, 1.0)
        self.optimizer.step()
        self.drop_gradients()
        for p, twin in zip(self.trained, self.twins):
            if p is not twin:
                p.data.copy_(twin)
        return loss.item(), norm.item()

    def drop_gradients(self) -> None:
        for p in [*self.trained, *self.twins]:
            p.grad = None


def _hand_over(twin, p) -> None:
    twin.grad, p.grad = p.grad.float(), None


class Nanodpo(Contender):
    """The project's own path. `layout`: shared (as in training), alone (packed, each prompt repeated), padded."""

    layout = "shared"

    def build(self):
        from nanodpo.core.attention import LOOP, VARLEN
        from nanodpo.core.logprobs import SequenceLogProbs
        from nanodpo.model.precision import mix_precision
        from nanodpo.model.ready import exchange_layers
        from nanodpo.model.recompute import FitToMemory, Recompute, sample_batch
        from nanodpo.run.memory import memory_budget

        model, device = adapted(self.work), torch.device(self.work.device)
        if self.work.mixed:
            for p in model.parameters():
                p.data = p.data.float() if p.requires_grad else p.data.bfloat16()
            mix_precision(model, self.work.mixed)
        exchange_layers(model, device)
        if self.layout != "padded":
            flash = self.work.device == "cuda" and torch.bfloat16 in (self.work.dtype, self.work.mixed)
            model.get_base_model().set_attn_implementation(VARLEN if flash else LOOP)
        self.module, self.recompute = SequenceLogProbs(model), Recompute(model)
        if self.work.checkpointing == "by need":
            # Moments and gradients, and of bfloat16 weights their twins, all float32, are still to come.
            reserved = sum((12 if p.dtype == torch.float32 else 16) * p.numel() for p in model.parameters()
                           if p.requires_grad)
            sample = functools.partial(sample_batch, "packed", model.config, device)
            budget = memory_budget(device, self.work.activation_memory, reserved)
            self.fit = FitToMemory(self.recompute, self.module, sample, budget)
        self.recompute_by(self.work.checkpointing)
        return model

    def recompute_by(self, checkpointing):
        self.work.checkpointing = checkpointing
        if checkpointing != "by need":  # that is chosen anew for each step
            self.recompute.use(checkpointing)

    def modes(self, k):
        if self.work.checkpointing != "by need":
            return super().modes(k)
        return self.fit(sum(sum(map(len, pair)) for pair in self.batch(k)))

    def step(self, k):
        self.modes(k)  # which also chooses, "by need", what this step recomputes
        return super().step(k)

    def logps(self, pairs: list[Pair]):
        from nanodpo.core.packing import pack, pad

        groups = [(prompt, [chosen, rejected]) for prompt, chosen, rejected in pairs]
        if self.layout == "alone":
            groups = [(prompt, [response]) for prompt, responses in groups for response in responses]
        row = (pad if self.layout == "padded" else pack)(groups)
        row = row.to(torch.device(self.work.device))
        return self.module(row).view(-1, 2)

    def losses(self, pairs, ref):
        from nanodpo.core.losses import dpo, pair_losses
        from nanodpo.run.metrics import Meter, pair_metrics

        tokens = torch.tensor([[len(chosen), len(rejected)] for _, chosen, rejected in pairs], dtype=torch.float64)
        logps, tokens = self.logps(pairs), tokens.to(ref.device)
        loss = functools.partial(dpo, beta=BETA)
        losses = pair_losses(loss, logps, ref, tokens)
        self.meter = Meter(ref.device)
        self.meter.add({"loss": losses.detach(), **pair_metrics(loss, logps, ref, tokens, BETA)}, 1.0)
        return losses

    def update(self, loss):
        self.means = self.meter.means()  # as training logs them
        return super().update(loss)


class Alone(Nanodpo):
    layout = "alone"


class Padded(Nanodpo):
    layout = "padded"


class Plain(Contender):
    """DPO as a textbook has it."""

    def logps(self, pairs: list[Pair]):
        lines = [(p, y) for p, chosen, rejected in pairs for y in (chosen, rejected)]
        width = max(len(p) + len(y) for p, y in lines)
        ids, mask = torch.zeros(2, len(lines), width, dtype=torch.long)
        scored = torch.zeros(len(lines), width, dtype=torch.bool)
        for i, (p, y) in enumerate(lines):
            ids[i, : len(p) + len(y)] = torch.tensor(p + y)
            mask[i, : len(p) + len(y)] = 1
            scored[i, len(p) : len(p) + len(y)] = True
        ids, mask, scored = (x.to(self.work.device) for x in (ids, mask, scored))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logps * scored[:, 1:]).sum(1).view(-1, 2)

    def losses(self, pairs, ref):
        chosen, rejected = self.logps(pairs).unbind(1)
        return -F.logsigmoid(BETA * ((chosen - ref[:, 0]) - (rejected - ref[:, 1])))


class Trl(Contender):
    """TRL's own trainer, fed with the same ids; its training_step is timed whole, metrics included."""

    def build(self):
        import datasets
        import tokenizers
        from transformers import PreTrainedTokenizerFast
        from trl import DPOConfig, DPOTrainer

        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        self.rows = [dict(zip(names, pair)) for pair in self.work.pairs]
        own, DPOTrainer._prepare_dataset = DPOTrainer._prepare_dataset, lambda self, dataset, *a: dataset
        bf16 = torch.bfloat16 in (self.work.dtype, self.work.mixed)
        args = DPOConfig(tempfile.mkdtemp(), use_cpu=self.work.device == "cpu", bf16=bf16, max_length=None,
                         per_device_train_batch_size=self.work.batch, beta=BETA, report_to="none", disable_tqdm=True,
                         gradient_checkpointing=self.work.checkpointing == "full",
                         gradient_checkpointing_kwargs={"use_reentrant": False})
        columns = {name: ["-"] * len(self.rows) for name in ("prompt", "chosen", "rejected")}
        data = datasets.Dataset.from_dict(columns | {n: [row[n] for row in self.rows] for n in names})
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"-": 0}, unk_token="-"))  # asked for, never used
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="-", eos_token="-")
        try:
            self.trainer = DPOTrainer(base_model(self.work), args=args, train_dataset=data, peft_config=lora_config(
                self.work), processing_class=tokenizer)
        finally:
            DPOTrainer._prepare_dataset = own
        self.trainer.current_gradient_accumulation_steps = 1  # its train() would set both
        self.recompute_by(self.work.checkpointing)
        return self.trainer.model

    def recompute_by(self, checkpointing):
        self.work.checkpointing = checkpointing
        if checkpointing == "full":
            self.trainer.model.gradient_checkpointing_enable(self.trainer.args.gradient_checkpointing_kwargs)
        else:
            self.trainer.model.gradient_checkpointing_disable()

    def inputs(self, k):
        start = (k % self.steps) * self.work.batch
        batch = self.trainer.data_collator(self.rows[start : start + self.work.batch])
        return {name: value.to(self.work.device) for name, value in batch.items()}

    def prepare(self) -> None:
        self.trainer.precompute_ref_logps = self.work.cached
        if self.work.cached:
            for k in range(self.steps):
                with self.trainer.accelerator.autocast():
                    chosen, rejected = self.trainer.compute_ref_log_probs(self.trainer.model, self.inputs(k))
                self.cache[k] = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def step(self, k):
        inputs = self.inputs(k) | (self.cache[k % self.steps] if self.work.cached else {})
        with self.trainer.accelerator.autocast():  # else its LoRA, kept in float32, would multiply in float32
            loss = self.trainer.training_step(self.model, inputs)
        return self.update(loss)


CONTENDERS = {"nanodpo": Nanodpo, "plain": Plain, "trl": Trl, "alone": Alone, "padded": Padded}


def build(name: str, work: Work) -> Contender:
    contender = CONTENDERS[name](work)
    contender.prepare()
    return contender


def tiny_wide(hidden: int = 64, layers: int = 2, vocabulary: int = 151_936) -> dict:
    """Almost no model under a Qwen-sized vocabulary: the cost of the head, seen alone."""
    return {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 2**17, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2}


def random_pairs(count: int, prompt: int, chosen: int, rejected: int, vocabulary: int) -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(vocabulary, (n,), generator=draw).tolist() for n in (prompt, chosen, rejected))
            for _ in range(count)]


def real_pairs(model: str, file: str, max_length: int) -> list[Pair]:
    """A file's pairs as train.py reads them, responses cut to fit."""
    from nanodpo.data.template import read_template
    from nanodpo.data.tokens import load_dataset
    from nanodpo.flags.arguments import TrainArguments
    from nanodpo.model.source import open_source

    args = TrainArguments(model_name=model, train_file_path=file, overlong="truncate", on_bad_row="drop")
    template = read_template(open_source(model, False).tokenizer, None)
    data = load_dataset(file, template, args, max_length, pairs=True)
    return [(e.prompt, e.chosen, e.rejected) for e in data.examples]
