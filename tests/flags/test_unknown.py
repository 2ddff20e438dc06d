"""Whoever comes from TRL with a command line or a settings file of it is told what each name is here."""

import dataclasses
import inspect

import pytest

from nanodpo.core.losses import INPUTS, LOSSES
from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments, parse
from nanodpo.flags.unknown import OTHERWISE, hint

FLAGS = [field.name for field in dataclasses.fields(TrainArguments)]
# All fields of TRL 1.16's DPOConfig, SFTConfig, CPOConfig, ORPOConfig, ScriptArguments and ModelConfig, those that they
# have from transformers' TrainingArguments included.
TRL = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs activation_offloading adam_beta1 adam_beta2
adam_epsilon alpha assistant_only_loss attn_implementation auto_find_batch_size average_tokens_across_devices
batch_eval_metrics beta bf16 bf16_full_eval bnb_4bit_quant_storage bnb_4bit_quant_type chat_template_path
completion_only_loss cpo_alpha data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset_config
dataset_kwargs dataset_name dataset_num_proc dataset_streaming dataset_test_split dataset_text_field
dataset_train_split ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
ddp_timeout debug deepspeed disable_dropout disable_tqdm discopop_tau do_eval do_predict do_train dtype
enable_jit_checkpoint eos_token eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_packing
eval_steps eval_strategy eval_use_gather_object f_alpha_divergence_coef f_divergence_type fp16 fp16_full_eval fsdp
fsdp_config full_determinism generate_during_eval gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
hub_token ignore_bias_buffers ignore_data_skip include_for_metrics include_num_input_tokens_seen is_encoder_decoder
label_names label_smoothing label_smoothing_factor ld_alpha learning_rate length_column_name liger_kernel_config
load_best_model_at_end load_in_4bit load_in_8bit local_rank log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_steps logging_strategy lora_alpha lora_dropout lora_modules_to_save
lora_r lora_target_modules lora_target_parameters lora_task_type loss_type loss_weights lr_scheduler_kwargs
lr_scheduler_type max_completion_length max_grad_norm max_length max_steps metric_for_best_model model_init_kwargs
model_name_or_path model_revision neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir
packing packing_strategy pad_to_multiple_of pad_token padding_free padding_value parallelism_config
per_device_eval_batch_size per_device_train_batch_size precompute_ref_batch_size precompute_ref_log_probs
prediction_loss_only project push_to_hub ref_model_mixup_alpha ref_model_sync_steps remove_unused_columns report_to
restore_callback_states_from_checkpoint resume_from_checkpoint router_aux_loss_coef run_name save_on_each_node
save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset simpo_gamma skip_memory_metrics
sync_ref_model tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id
trackio_space_id trackio_static_space_id train_sampling_strategy truncation_mode trust_remote_code use_bnb_nested_quant
use_cache use_cpu use_dora use_liger_kernel use_peft use_rslora use_weighting warmup_steps weight_decay
""".split()


def message_of(*flags: str) -> str:
    """The error of this command line."""
    with pytest.raises(UserError) as caught:
        parse(["--model_name", "M", "--train_file_path", "D", *flags], None)
    return str(caught.value)


@pytest.mark.parametrize("name", TRL)
def test_every_name_of_trl_is_a_flag_or_has_a_hint_of_its_own(name):
    """None is guessed from its letters."""
    words = hint(f"--{name}", FLAGS, OTHERWISE)
    assert (name in FLAGS) != (bool(words) and "did you mean" not in words), words


@pytest.mark.parametrize("name, words", [
    ("prompt_column", "it is --prompt_field here"),
    ("config", "the settings file comes first, without a flag: train.py FILE.yaml"),
    ("gamma_beta_ratio", "simpo_gamma is this ratio times --beta: --loss_kwargs '{\"simpo_gamma\": VALUE}'"),
    ("eval_accumulation_steps", "not needed: an evaluation keeps no logits"),
    ("label_smoothing_factor", "that smooths a token's target, which is not here; --label_smoothing is the chance of a "
                               "flipped preference"),
    ("model_init_kwargs", "there are --bf16, --load_in_4bit and --trust_remote_code; dtype and attention are chosen by "
                          "the run"),
    ("loss_weights", "for TRL's sigmoid with sft it is --sft_weight; another sum of losses is a function of your own "
                     "(docs/losses.md)"),
    ("lr_scheduler_kwargs", "no schedule here has settings; leave it out"),
    ("optim_target_modules", "AdamW is the only optimizer; leave it out"),
    ("lora_target_parameters", "target_parameters in the file of --peft_config"),
    ("packing_strategy", OTHERWISE["packing"]), ("eval_packing", OTHERWISE["packing"]),
    *[(name, "the order is drawn by --seed, anew each epoch, whatever the lengths of rows")
      for name in ("group_by_length", "train_sampling_strategy", "shuffle_dataset")],
    ("dataset_streaming", "all rows are read before step 0; leave it out"),
    ("dataset_kwargs", "not needed: leave it out"),
    ("eval_delay", "step 0 and the end are always evaluated, where there is --eval_file_path or --eval_size"),
    ("auto_find_batch_size", "--dry_run says whether the longest micro-batch fits; --activation_memory adapts to each "
                             "batch"),
    ("hub_revision", "nothing is uploaded; leave it out"),
    ("project", "it is --report_to wandb here (or tensorboard, csv_monitor, comet), in the project that WANDB_PROJECT "
                "names"),
    ("alpha", "that is AlphaPO's in TRL, and there is no such loss; a function of your own gives it (docs/losses.md)"),
    ("activation_checkpointing", "it is --gradient_checkpointing here"),
    ("per_device_batch_size", "it is --per_device_train_batch_size here"),
    ("cpo_alpha", "it is --loss_kwargs '{\"cpo_alpha\": VALUE}' here")])
def test_a_name_that_resembles_a_flag_is_not_taken_for_it(name, words):
    """The words say what there is in its place."""
    assert hint(f"--{name}", FLAGS, OTHERWISE) == words


def test_every_setting_of_a_loss_is_sent_to_loss_kwargs():
    """Those that a loss may get later, too: they are read off the signatures."""
    takes = {name for loss in LOSSES.values() for name in inspect.signature(loss).parameters}
    own = takes - {*INPUTS, *FLAGS}
    assert own >= {"cpo_alpha", "simpo_gamma", "dpop_lambda", "shift_lambda", "gate_slope", "gate_threshold"}
    for name in own:
        assert message_of(f"--{name}", "1") == (
            f"unknown argument --{name}: it is --loss_kwargs '{{\"{name}\": VALUE}}' here")


@pytest.mark.parametrize("typed, ours", [
    ("learning_rat", "learning_rate"), ("lerning_rate", "learning_rate"), ("eval_stpes", "eval_steps"),
    ("max-step", "max_steps"), ("per_device_train_batchsize", "per_device_train_batch_size"),
    ("outputdir", "output_dir"), ("save_step", "save_steps"),
    ("gradient_accumulation_step", "gradient_accumulation_steps"),
    ("lora_alhpa", "lora_alpha"), ("lr_schedular_type", "lr_scheduler_type")])
def test_a_slip_of_the_finger_still_finds_its_flag(typed, ours):
    assert hint(f"--{typed}", FLAGS, OTHERWISE) == f"did you mean --{ours}?"


@pytest.mark.parametrize("name", ["optim_target_layers", "eval_accumulation", "hub_commit", "lora_target_rows",
                                  "dataset_weighting", "activation_pinning", "trackio_project", "dataloader_timeout",
                                  "reward_weights", "gradient_noise"])
def test_a_name_that_nobody_knows_is_not_guessed(name):
    """It shares many letters with a flag, or with another program's name."""
    assert hint(f"--{name}", FLAGS, OTHERWISE) == ""


@pytest.mark.parametrize("flags, words", [
    (["--save_steps", "0.1"], "--save_steps: invalid int value: '0.1'; a number of steps, not a fraction"),
    (["--logging-steps", ".1"], "--logging-steps: invalid int value: '.1'; a number of steps, not a fraction"),
    (["--eval_steps", "0.1"], "a number of steps, not a fraction"),
    (["--warmup_steps", "0.1"], "a number of steps, not a fraction"),
    (["--lr_scheduler_type", "constant_with_warmup"], "; it is constant with --warmup_steps"),
    (["--report_to", "all"], "; name those that you want, with spaces between: --report_to tensorboard wandb"),
    (["--report_to", "wandb,tensorboard"], "with spaces between"), (["--report_to", "mlflow"], "name those that")])
def test_a_value_that_transformers_takes_is_answered_with_what_it_is_here(flags, words):
    """It takes fractions of a run as numbers of steps, and programs that DeepSpeed has no monitor for."""
    assert words in message_of(*flags)


def test_the_modules_of_lora_may_be_a_list(tmp_path):
    """With spaces between, as TRL takes them, with commas, or as a list in a settings file: one setting."""
    file = tmp_path / "run.yaml"
    needed = ["--model_name", "M", "--train_file_path", "D"]
    for text in ("[q_proj, v_proj]", "q_proj,v_proj"):
        file.write_text(f"lora_target_modules: {text}\n")
        assert parse([str(file), *needed], None).lora_target_modules == "q_proj,v_proj"
    for words in (["q_proj", "v_proj"], ["q_proj,v_proj"]):
        assert parse([*needed, "--lora_target_modules", *words], None).lora_target_modules == "q_proj,v_proj"
    assert parse(needed, None).lora_target_modules == "all-linear"
