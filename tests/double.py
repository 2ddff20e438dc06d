"""train.py or score.py in float64: double.py SCRIPT ARGUMENTS ...; launched by test_ulysses.py. Two computations of one
number then differ by 1e-10, where in float32 rounding hides what is wrong."""

import importlib
import os
import sys

import torch
from tiny_models import KeepDouble

from nanodpo.errors import exit_process, run_script
from nanodpo.model import ready
from nanodpo.model.sharding import cast
from nanodpo.run import engine

MAKE_READY = ready.make_ready


def make_ready(model, *args, **kwargs):
    for weight in model.double().parameters():  # which leaves the parts that ranks share as they are
        cast(weight, torch.float64)
    return MAKE_READY(model, *args, **kwargs)


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine._DeepSpeedEngine__check_params = lambda *args: None  # that all are float32
    CPU_Accelerator.supported_dtypes = lambda *args: [torch.float64]
    engine.make_ready = ready.make_ready = make_ready
    script = importlib.import_module(sys.argv.pop(1))
    with KeepDouble():
        exit_process(run_script(script.main))


if __name__ == "__main__":
    main()
