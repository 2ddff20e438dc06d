"""How a run starts: what it does not import."""

import subprocess
import sys

from conftest import ROOT


def test_no_compiler_is_imported():
    """ZeRO's stages import an optimizer that compiles functions on import, which no run uses; in a process of its own,
    since others may have a reason to import torch's compiler."""
    code = ("import sys; from nanodpo.run.engine import import_muon; import_muon()\n"
            "from deepspeed.runtime.zero.utils import is_zero_supported_optimizer as supported\n"
            "from deepspeed.runtime.zero.muon.original_muon import MuonWithAuxAdam\n"
            "print(sorted({'torch._inductor.compile_fx', 'torch._dynamo.eval_frame'} & {*sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
