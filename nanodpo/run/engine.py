"""The DeepSpeed engine around the log-prob module."""

import contextlib
from unittest import mock

import torch

from ..core.logprobs import SequenceLogProbs
from ..errors import UserError
from ..model.decay import is_decayed
from ..model.ready import make_ready
from ..model.sharding import is_sharded, stage_of
from ..ranks import distributed
from . import memory


def make_engine(model, args, settings: dict, device, longest: int) -> tuple:
    """(DeepSpeed's engine around a SequenceLogProbs, the layout of its batches, the name of its attention).

    The model is made ready: precision, layers that compute the same with less, recomputation; the layout is one that
    gives this model's own log-probs. `longest`: tokens of the longest sequence.
    """
    import deepspeed  # all slow to import, and --help and wrong input don't need them

    from ..model import selfcheck, ulysses
    from ..model.recompute import FitToMemory, Recompute, sample_batch

    stage = stage_of(settings)
    product_dtype = make_ready(model, args.bf16, device, zero3=stage == 3)
    if args.gradient_checkpointing or args.activation_memory:
        recompute = Recompute(model, stage)
        recompute.use("full")  # until FitToMemory has measured what fits
    trained = [(p, is_decayed(name, p)) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for p, decayed in trained if decayed], "weight_decay": args.weight_decay},
              {"params": [p for p, decayed in trained if not decayed], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=args.learning_rate,
                                  betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
    module = SequenceLogProbs(model)
    module.parallel = ulysses.ranks_of_a_batch(args.sequence_parallel_size)
    import_muon()
    if is_sharded(model):
        model.to(device)  # what the ranks do not share: buffers, and LoRA, which DeepSpeed shards itself
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    # The hooks of stage 3 expect a backward pass after a forward one in training mode.
    to_train = not args.allow_dropout and stage < 3
    layout, attention = selfcheck.choose_layout(module, device, product_dtype, args.use_flash_attention, longest,
                                                to_train)
    distributed.say(selfcheck.describe(layout, attention, module.parallel.size))
    if args.activation_memory:
        if not selfcheck.memory_is_linear(model.config.get_text_config(), attention, longest):
            raise UserError("--activation_memory: this model's attention takes memory by the square of a batch's "
                            "length, which is not foreseen; use --gradient_checkpointing")
        budget = memory.memory_budget(device, args.activation_memory, memory.bytes_to_come(module, stage))

        def sample(tokens: int):  # of a batch, by whose tokens it chooses, each of the ranks that share it has a part
            return module.parallel.shard(sample_batch(layout, model.config, device, tokens))

        fit = FitToMemory(recompute, module, sample, budget * module.parallel.size)
        module.register_forward_pre_hook(fit.before_forward)
        distributed.say(f"activations: {memory.gib(budget)}; {fit}")
    return engine, layout, attention


def import_muon() -> None:
    """Imports Muon as DeepSpeed does where torch has no compiler. Every ZeRO stage imports this optimizer, which no run
    uses, and compiling its functions would import torch's compiler: 3 seconds and 100 MiB on each rank."""
    with contextlib.suppress(ImportError, AttributeError):  # other versions have it elsewhere, or not at all
        from deepspeed.runtime import compiler

        with mock.patch.object(compiler, "compile", lambda: compiler.dummy_decorator):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401


def end_prefetch(engine) -> None:
    """Puts away what ZeRO-3 fetched ahead for a backward pass: an evaluation has none, and a weight that is still on
    its way can't be gathered. All ranks must call it."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()
        engine.optimizer.checkpoint_event_epilogue()
