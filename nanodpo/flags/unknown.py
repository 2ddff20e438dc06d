"""Hints for an unknown flag: it was mistyped, or other trainers have it."""

import difflib

from ..core.losses import LOSSES, settings_of
from ..errors import UserError

# Flags of TRL, transformers and others that have another name here ...
RENAMED = {name: ours for ours, names in {
    "model_name": "model_name_or_path model model_path model_id base_model pretrained_model_name_or_path",
    "prompt_field": "prompt_column", "chosen_field": "chosen_column dataset_text_field",
    "rejected_field": "rejected_column", "chat_template": "chat_template_path chat_template_file chat_template_jinja",
    "train_on": "mask_history roles_to_train",
    "train_file_path": "dataset_name dataset dataset_path data_path train_file train_data train_dataset data",
    "eval_file_path": "eval_dataset eval_dataset_name validation_file eval_file test_file eval_data",
    "split": "dataset_split dataset_train_split train_split", "eval_split": "dataset_test_split test_split",
    "mix_weights": "dataset_mixer interleave_probs dataset_weights mixing_weights datasets_weights",
    "max_length": "max_seq_length max_seq_len model_max_length cutoff_len max_tokens",
    "use_lora": "use_peft peft", "lora_r": "lora_rank peft_lora_r", "lora_alpha": "peft_lora_alpha",
    "load_in_4bit": "use_qlora qlora",
    "lora_dropout": "peft_lora_dropout", "lora_target_modules": "target_modules lora_target",
    "num_train_epochs": "epochs num_epochs n_epochs", "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_gpu_train_batch_size "
                                   "per_device_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulate_grad_batches",
    "lr_scheduler_type": "lr_scheduler scheduler", "max_grad_norm": "gradient_clipping clip_grad max_norm",
    "gradient_checkpointing": "activation_checkpointing", "seed": "data_seed random_seed",
    "deepspeed": "deepspeed_config", "output_dir": "output output_path save_dir",
    "use_flash_attention": "flash_attn use_flash_attn",
    "deterministic": "full_determinism use_deterministic_algorithms",
    "beta": "dpo_beta pref_beta", "sft_weight": "rpo_alpha",
    "reference": "ref_model ref_model_name_or_path reference_model",
    "merge_weights": "merge_adapter merge_lora",
    "sequence_parallel_size": "sp_size sequence_parallel_degree ulysses_size context_parallel_size ring_attn_size",
}.items() for name in names.split()}
# ... and those that are not needed, or have another meaning here.
OTHERWISE = {name: what for what, names in {
    "it is --loss here, and TRL's sigmoid is dpo": "loss_type pref_loss objective",
    "it is --warmup_steps here, a number of steps": "warmup_ratio",
    "not needed: metrics.jsonl in --output_dir has every step, and training.png shows it":
        "logging_dir run_name logging_strategy logging_first_step",
    "it is --report_to wandb here (or tensorboard, csv_monitor, comet), in the project that WANDB_PROJECT names":
        "use_wandb wandb_project project tracker_name log_with",
    "not needed: train.py trains, and evaluates where there is --eval_file_path or --eval_size":
        "do_train do_eval do_predict stage",
    "not needed: --eval_steps evaluates every so many steps, besides before and after training":
        "eval_strategy evaluation_strategy eval_on_start",
    "not needed: --save_steps saves every so many steps, besides the first and the last": "save_strategy",
    "not needed: the same command goes on with a run; --resume names another folder": "resume_from_checkpoint",
    "no folder is written over; name a new --output_dir": "overwrite_output_dir overwrite_cache",
    "there is --bf16, else float32; no fp16": "mixed_precision fp16 torch_dtype dtype tf32",
    "it is --load_in_4bit (nf4, double quantisation; products in bfloat16 with --bf16) or --load_in_8bit here":
        "quantization_bit quantization use_bnb_nested_quant bnb_4bit_quant_type bnb_4bit_use_double_quant "
        "bnb_4bit_compute_dtype bnb_4bit_quant_storage",
    "not needed: each run finds out what is right for its model; --use_flash_attention demands the kernel":
        "attn_implementation padding_free packing packing_strategy eval_packing use_liger_kernel use_liger_loss",
    "AdamW is the only optimizer; leave it out": "optim optimizer optim_args optim_target_modules",
    "no schedule here has settings; leave it out": "lr_scheduler_kwargs",
    "the reference is --model_name as training finds it, or --reference; its log-probs are computed before training":
        "precompute_ref_log_probs precompute_ref_batch_size reference_free ref_model_init_kwargs",
    "the reference never moves": "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "there are --bf16, --load_in_4bit and --trust_remote_code; dtype and attention are chosen by the run":
        "model_init_kwargs",
    "a setting in the file of --peft_config":
        "use_rslora use_dora rank_pattern alpha_pattern lora_bias init_lora_weights layers_to_transform "
        "exclude_modules target_parameters",
    "target_parameters in the file of --peft_config": "lora_target_parameters",
    "only LoRA on linear layers is trained, or with --use_lora false the whole model":
        "lora_modules_to_save modules_to_save additional_target",
    "not needed: dropout is off unless --allow_dropout": "disable_dropout",
    "--overlong truncate cuts the end of a response to --max_length; a prompt is never cut":
        "truncation_mode max_completion_length max_target_length max_response_length",
    "a part of --model_name, which may be NAME@REVISION of the hub": "model_revision",
    "a part of --train_file_path, which may be NAME@REVISION:CONFIG:SPLIT of the hub":
        "dataset_config dataset_config_name subset revision",
    "answers alone are scored, with their ends of turn; --train_on last scores the last one":
        "assistant_only_loss completion_only_loss train_on_prompt train_on_inputs train_on_input",
    "all checkpoints of --save_steps stay; score.py compares them": "load_best_model_at_end metric_for_best_model "
        "greater_is_better",
    "nothing here takes it; docs/losses.md has all losses and their settings":
        "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau neftune_noise_alpha",
    "for TRL's sigmoid with sft it is --sft_weight; another sum of losses is a function of your own (docs/losses.md)":
        "loss_weights",
    "that is AlphaPO's in TRL, and there is no such loss; a function of your own gives it (docs/losses.md)": "alpha",
    "simpo_gamma is this ratio times --beta: --loss_kwargs '{\"simpo_gamma\": VALUE}'": "gamma_beta_ratio",
    "that smooths a token's target, which is not here; --label_smoothing is the chance of a flipped preference":
        "label_smoothing_factor",
    "the router's auxiliary loss is not added; leave it out": "router_aux_loss_coef",
    "nothing is uploaded; leave it out":
        "push_to_hub hub_model_id hub_token hub_strategy hub_revision hub_private_repo hub_always_push",
    "ZeRO shares a model among GPUs: a stage in the file of --deepspeed": "fsdp fsdp_config zero_stage",
    "the settings file comes first, without a flag: train.py FILE.yaml": "config config_file",
    "all rows are read before step 0; leave it out": "dataset_streaming streaming",
    "the order is drawn by --seed, anew each epoch, whatever the lengths of rows":
        "shuffle_dataset group_by_length train_sampling_strategy length_column_name",
    "a response is scored with its end: the template's end of turn, or of plain text the tokenizer's eos_token":
        "eos_token",
    "only causal language models are trained": "is_encoder_decoder",
    "not needed: an evaluation keeps no logits": "eval_accumulation_steps",
    "step 0 and the end are always evaluated, where there is --eval_file_path or --eval_size": "eval_delay",
    "an evaluation gives metrics alone; score.py --answers lets checkpoints answer":
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object include_for_metrics batch_eval_metrics "
        "label_names generate_during_eval",
    "an evaluation has the precision of training": "bf16_full_eval fp16_full_eval",
    "--dry_run says whether the longest micro-batch fits; --activation_memory adapts to each batch":
        "auto_find_batch_size",
    "--activation_memory recomputes layers, and moves their inputs to the CPU, as far as a batch needs":
        "activation_offloading",
    "checkpoints hold weights alone, and resume/ the states to go on from; SIGTERM saves by itself":
        "save_only_model enable_jit_checkpoint save_on_each_node",
    "not needed: a run goes on to the last bit": "ignore_data_skip restore_callback_states_from_checkpoint",
    "set CUDA_VISIBLE_DEVICES= in the environment, and no GPU is used": "use_cpu no_cuda",
    "not needed: always so; the loss is divided once, by the whole step": "average_tokens_across_devices",
    "not needed: metrics.jsonl has num_tokens and perf/tokens_per_second":
        "include_num_input_tokens_seen include_tokens_per_second",
    "a step that is not finite stops the run, or is left out with --skip_nonfinite": "logging_nan_inf_filter",
    "leave it out; mem/peak_gib is in metrics.jsonl": "log_on_each_node log_level_replica debug skip_memory_metrics",
    "there is no trackio; --report_to names those that are there":
        "trackio_space_id trackio_bucket_id trackio_static_space_id",
    "leave it out; for long pairs and large models there are --sequence_parallel_size and --deepspeed":
        "parallelism_config accelerator_config",
    "not needed: leave it out": "remove_unused_columns dataloader_num_workers dataloader_drop_last dataset_num_proc "
        "dataloader_pin_memory preprocessing_num_workers ddp_find_unused_parameters ddp_timeout disable_tqdm log_level "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs torch_compile torch_compile_backend "
        "torch_compile_mode torch_empty_cache_steps pad_token pad_to_multiple_of label_pad_token_id padding_value "
        "use_cache lora_task_type peft_type use_fast_tokenizer liger_kernel_config ignore_bias_buffers dataset_kwargs "
        "dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context "
        "dataloader_in_order ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend",
}.items() for name in names.split()}
# The settings of losses that are no flags.
OTHERWISE |= {name: f"it is --loss_kwargs '{{\"{name}\": VALUE}}' here" for loss in LOSSES.values()
              for name in settings_of(loss)}


def hint(typed: str, known, otherwise: dict[str, str] | None = None, dashes: str = "--") -> str:
    """A few words about a flag or setting that is not one of `known`; empty where there is no hint.

    `otherwise`: hints for the names of other programs, by name. A wrong guess is worse than none: a name of `known` is
    guessed where most letters agree, another program's where hardly one differs, as most of its names resemble others.
    """
    name = typed.lstrip("-").partition("=")[0].replace("-", "_")
    others = {theirs: f"it is {dashes}{ours} here" for theirs, ours in RENAMED.items() if ours in known}
    others |= otherwise or {}
    if name in others:
        return others[name]
    for words, cutoff in ((dict.fromkeys(known, ""), 0.85), (others, 0.93)):
        if close := difflib.get_close_matches(name, words, 1, cutoff):
            return f"did you mean {dashes}{close[0]}? {words[close[0]]}".rstrip()
    return ""


def parse_known(parser, argv: list[str], script: str, otherwise: dict[str, str] | None = None):
    """The parsed command line. Raises UserError for what the parser refuses, and for unknown flags, with hints."""
    def refuse(message: str):
        raise UserError(message)

    parser.error = refuse  # argparse would print the whole usage before the one line that matters
    args, rest = parser.parse_known_intermixed_args(argv)
    if rest:
        raise UserError(unknown_arguments(rest, vars(args), script, otherwise))
    return args


def unknown_arguments(rest: list[str], known, script: str, otherwise: dict[str, str] | None) -> str:
    """The error message for the words that a parser did not know; the word after an unknown flag is its value."""
    flags = [word for word in rest if word.startswith("--")] or rest[:1]
    hints = [(word.partition("=")[0], hint(word, known, otherwise)) for word in dict.fromkeys(flags)]
    named = "; ".join(f"{word}: {words}" if words else word for word, words in hints)
    help = "" if all(words for _, words in hints) else f"; `{script} --help` lists them all"
    return f"unknown argument{'s' * (len(hints) > 1)} {named}{help}"
