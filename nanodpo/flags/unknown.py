"""Hints for an unknown flag: it was mistyped, or other trainers have it."""

import difflib

from ..errors import UserError

# Flags of TRL, transformers and others that have another name here ...
RENAMED = {name: ours for ours, names in {
    "model_name": "model_name_or_path model model_path model_id base_model pretrained_model_name_or_path",
    "chosen_field": "dataset_text_field", "chat_template": "chat_template_path chat_template_file chat_template_jinja",
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
    "per_device_train_batch_size": "batch_size train_batch_size micro_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulate_grad_batches",
    "lr_scheduler_type": "lr_scheduler scheduler", "max_grad_norm": "gradient_clipping clip_grad max_norm",
    "label_smoothing": "label_smoothing_factor", "seed": "data_seed random_seed", "deepspeed": "deepspeed_config",
    "output_dir": "output output_path save_dir", "use_flash_attention": "flash_attn use_flash_attn",
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
        "use_wandb wandb_project tracker_name log_with",
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
        "attn_implementation padding_free packing group_by_length use_liger_kernel use_liger_loss",
    "AdamW is the only optimizer; leave it out": "optim optimizer optim_args",
    "the reference is --model_name as training finds it, or --reference; its log-probs are computed before training":
        "precompute_ref_log_probs precompute_ref_batch_size reference_free sync_ref_model model_init_kwargs "
        "ref_model_init_kwargs",
    "a setting in the file of --peft_config":
        "use_rslora use_dora rank_pattern alpha_pattern lora_bias init_lora_weights layers_to_transform "
        "exclude_modules",
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
    "all checkpoints of --save_steps stay; score.py compares them": "load_best_model_at_end metric_for_best_model",
    "nothing here takes it; docs/losses.md has all losses and their settings":
        "ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting discopop_tau loss_weights "
        "neftune_noise_alpha",
    "nothing is uploaded; leave it out": "push_to_hub hub_model_id hub_token hub_strategy",
    "ZeRO shares a model among GPUs: a stage in the file of --deepspeed": "fsdp fsdp_config zero_stage",
    "not needed: leave it out": "remove_unused_columns dataloader_num_workers dataloader_drop_last dataset_num_proc "
        "dataloader_pin_memory preprocessing_num_workers ddp_find_unused_parameters ddp_timeout disable_tqdm log_level "
        "gradient_checkpointing_kwargs torch_compile pad_token label_pad_token_id padding_value use_cache "
        "lora_task_type peft_type use_fast_tokenizer",
}.items() for name in names.split()}


def hint(typed: str, known, otherwise: dict[str, str] | None = None, dashes: str = "--") -> str:
    """A few words about a flag or setting that is not one of `known`; empty where there is no hint.

    `otherwise`: hints for the names of other programs, by name.
    """
    name = typed.lstrip("-").partition("=")[0].replace("-", "_")
    others = {theirs: f"it is {dashes}{ours} here" for theirs, ours in RENAMED.items() if ours in known}
    others |= otherwise or {}
    if name in others:
        return others[name]
    for words in (dict.fromkeys(known, ""), others):
        if close := difflib.get_close_matches(name, words, 1, 0.7):
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


def unknown_arguments(rest: list[str], known, script: str, otherwise: dict[str, str] | None = None) -> str:
    """The error message for the words that a parser did not know; the word after an unknown flag is its value."""
    flags = [word for word in rest if word.startswith("--")] or rest[:1]
    hints = [(word.partition("=")[0], hint(word, known, otherwise)) for word in dict.fromkeys(flags)]
    named = "; ".join(f"{word}: {words}" if words else word for word, words in hints)
    help = "" if all(words for _, words in hints) else f"; `{script} --help` lists them all"
    return f"unknown argument{'s' * (len(hints) > 1)} {named}{help}"
