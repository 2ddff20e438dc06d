"""Launchers and trainers that are not ours: what they leave in the environment and in files is understood, said or
refused; several processes never become several silent runs."""

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from nanodpo.errors import UserError
from nanodpo.flags.arguments import TrainArguments
from nanodpo.flags.launchers import LAUNCHERS, local_rank, take_over
from nanodpo.run.deepspeed_settings import engine_config
from nanodpo.run.other_trainers import accelerate_differs

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# What each launcher sets in process 1 of 4, which is the second of its machine.
STARTED = {
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                 "PMIX_RANK": "1"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "Intel MPI": {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "I_MPI_MPIRUN": "mpirun"},
    "PALS": {"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "PMI_SIZE": "4"},
    "Flux": {"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1", "PMI_RANK": "1", "PMI_SIZE": "4"},
    "MVAPICH": {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
    "jsrun": {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_LOCAL_RANK": "1"},
    "Slurm": {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
              "PMIX_RANK": "1"},
    "Slurm, without its step": {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"},
    # The shell of a batch job has Slurm's names too, those of one task.
    "Open MPI in a job of Slurm": {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
                                   "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4",
                                   "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def started(monkeypatch):
    """Sets the environment that a launcher leaves; what take_over adds to it goes at the end."""
    def start(names: dict) -> None:
        for name in [*os.environ]:
            if name in {*RANKS, *MEETING} or name.split("_")[0] in (
                    "OMPI", "MV2", "JSM", "FLUX", "PMI", "PMIX", "MPI", "PALS", "SLURM", "ACCELERATE"):
                monkeypatch.delenv(name)
        for name in RANKS:  # so that monkeypatch takes away what is set
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("launcher", STARTED)
def test_a_launchers_own_names_are_taken_over(launcher, started):
    started(STARTED[launcher] | MEETING)
    assert local_rank(-1) == 1
    assert {name: os.environ[name] for name in RANKS} == {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize("launcher", STARTED)
def test_processes_without_a_place_to_meet_are_refused(launcher, started):
    """In one line, which says what to export; nothing is taken over."""
    started(STARTED[launcher])
    with pytest.raises(UserError, match="of 4 processes of .*export MASTER_ADDR and MASTER_PORT, the host of"):
        local_rank(-1)
    assert "RANK" not in os.environ
    started(STARTED[launcher] | {"MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(UserError, match="export MASTER_PORT"):
        local_rank(-1)


@pytest.mark.parametrize("launcher", STARTED)
def test_one_process_of_a_launcher_is_a_plain_run(launcher, started):
    sizes = {name for _, _, several, _ in LAUNCHERS for name in several.split()}
    started({name: "1" if name in sizes else "0" for name in STARTED[launcher]})
    assert local_rank(-1) == 0 and "RANK" not in os.environ


def test_a_shell_within_a_job_is_a_plain_run(started):
    """salloc sets the job's size, and no number of a task."""
    started({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"})
    assert local_rank(-1) == 0


def test_torchrun_under_another_launcher_counts(started):
    """As `srun torchrun`, one a machine."""
    started(STARTED["Slurm"] | MEETING | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"})
    assert local_rank(-1) == 2 and os.environ["RANK"] == "5" and os.environ["WORLD_SIZE"] == "8"


@pytest.mark.parametrize("names, words", [
    ({"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1"}, "does not tell each its WORLD_SIZE; export RANK"),
    ({"PMIX_RANK": "1"}, "does not tell each its WORLD_SIZE and LOCAL_RANK; export RANK"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "does not tell each its RANK and LOCAL_RANK"),
    ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "(PMI_RANK=1, PMI_SIZE=4), which does not tell each its LOCAL_RANK"),
    ({"PMI_RANK": "1", "PMI_SIZE": "four", "MPI_LOCALRANKID": "0"}, "PMI_SIZE is 'four' in the environment, not a num"),
    (STARTED["Slurm"] | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 in the environment, but srun says"),
    ({"PMI_RANK": "4", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", **MEETING}, "RANK is 4 and WORLD_SIZE 4"),
])
def test_half_of_what_it_takes_is_refused(names, words, started):
    started(names)
    with pytest.raises(UserError, match=re.escape(words)):
        local_rank(-1)


def test_what_is_exported_besides_counts(started):
    started({"PMI_RANK": "1", "PMI_SIZE": "4", "LOCAL_RANK": "3", **MEETING})
    take_over()
    assert os.environ["LOCAL_RANK"] == "3"
    started({"PALS_RANKID": "1", "PALS_LOCAL_RANKID": "1", "WORLD_SIZE": "4", **MEETING})
    take_over()
    assert os.environ["RANK"] == "1" and os.environ["WORLD_SIZE"] == "4"


def test_two_processes_of_mpiexec_are_one_run():
    """They meet, and only the first speaks."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, ROOT / "train.py", "--model_name", "M", "--train_file_path", "D", "--print_config"]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | {
        "PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port}) for rank in range(2)]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert json.loads(said[0][0])["model_name"] == "M" and said[1][0] == ""


# Files and variables of other trainers


def arguments(**flags) -> TrainArguments:
    return TrainArguments(model_name="M", train_file_path="D", **flags)


AUTO = {"optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupCosineLR", "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr",
                                                                         "warmup_num_steps"), "auto")},
        "gradient_clipping": "auto", "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}


def test_auto_in_a_deepspeed_file_means_the_flags(capsys):
    """The settings are those of a file without optimizer and scheduler, since train.py makes both."""
    args = arguments(learning_rate=3e-4, weight_decay=0.1)
    plain = engine_config({"zero_optimization": {"stage": 2}}, "ds.json", args)
    assert engine_config(AUTO, "ds.json", args) == plain
    assert capsys.readouterr().out == ""
    same = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "eps": 1e-8,
                                                        "weight_decay": 0.1}}}
    for name, meant in (("WarmupLR", "constant"), ("WarmupDecayLR", "linear")):
        scheduler = {"type": name, "params": {"warmup_min_lr": 0, "warmup_max_lr": "auto", "total_num_steps": "auto"}}
        assert engine_config(AUTO | same | {"scheduler": scheduler}, "ds.json", args) == plain
        assert capsys.readouterr().out == (f"ds.json: scheduler {name} is {meant}; this run is cosine, which "
                                           "--lr_scheduler_type decides\n")


def test_the_batch_of_a_deepspeed_file_is_that_of_a_step(monkeypatch):
    """Four ranks, of which two share each of the batches of 2 pairs, three times a step: 12 pairs."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    args = arguments(per_device_train_batch_size=2, gradient_accumulation_steps=3, sequence_parallel_size=2)
    assert "train_batch_size" not in engine_config({"train_batch_size": 12}, "ds.json", args)
    for wrong in (2, 4, 6, 8, 24):
        with pytest.raises(UserError, match="sets train_batch_size, which train.py owns"):
            engine_config({"train_batch_size": wrong}, "ds.json", args)


@pytest.mark.parametrize("block", [
    {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    {"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}},
    {"optimizer": {"type": "Lamb", "params": {"lr": "auto"}}},
    {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "freeze_step": 4}}}, {"optimizer": []},
    {"optimizer": {"type": "AdamW", "params": [1]}}, {"optimizer": {"type": "AdamW", "legacy_fusion": True}},
    {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, {"scheduler": {"type": ["WarmupLR"]}},
    {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}}])
def test_what_contradicts_a_flag_is_refused(block):
    with pytest.raises(UserError, match=f"sets {[*block][0]}, which train.py owns"):
        engine_config(block, "ds.json", arguments())


def test_what_accelerate_was_told_otherwise_is_said(started):
    settings = engine_config({"zero_optimization": {"stage": 2}}, "ds.json", arguments())
    started({"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
             "ACCELERATE_USE_FSDP": "true",
             "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
             "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    said = accelerate_differs(arguments(), settings)
    for words in ("ACCELERATE_MIXED_PRECISION=bf16, here no (--bf16 decides)",
                  "ACCELERATE_DEEPSPEED_ZERO_STAGE=3, here 2 (--deepspeed decides)", "ACCELERATE_USE_FSDP=true",
                  "GRADIENT_ACCUMULATION_STEPS=8, here 1", "OFFLOAD_OPTIMIZER_DEVICE=cpu, here none"):
        assert words in said, said


def test_what_accelerate_sets_by_itself_is_not_said(started):
    """`accelerate launch --use_deepspeed --zero_stage 2`, beside --bf16."""
    settings = engine_config({"zero_optimization": {"stage": 2}}, "ds.json", arguments())
    started({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
             "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
             "ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
             "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"})
    assert accelerate_differs(arguments(bf16=True), settings) == ""
