"""Sets what a process needs before its first tensor on a GPU; names torch's errors for what rounds anew each time."""

import contextlib
import os

import torch

from ..errors import RunStopped, UserError, first_line

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def use_expandable_segments() -> None:
    """Lets CUDA's allocator grow its blocks. Batches have all lengths, and blocks of their own sizes would leave holes
    that fit no other batch. To be called before CUDA starts, as it does where a GPU is asked for its name: then
    alone the allocator reads its settings. A user's own setting stays."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def round_alike() -> None:
    """Lets training and scoring round alike on a GPU, --deterministic or not. To be called before the first tensor on
    the GPU: cuBLAS reads its setting once in a process."""
    os.environ.setdefault(CUBLAS, ":4096:8")  # what deterministic products ask for; 32 MiB
    torch.backends.cuda.enable_cudnn_sdp(False)  # an attention that deterministic training has not
    # Products of float32 round as float32 does, and no sum of bfloat16 products is rounded halfway. By default they may
    # be, and a container's TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 takes three digits from every product of float32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def be_deterministic() -> None:
    """From now on operations on a GPU add in one order. One that can't raises an error, which
    `nondeterminism_reported` puts in words."""
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would load torch's compiler first: 1.5 s
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums in NVLink's switches: other bits each time
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help in finding faults, which takes time


@contextlib.contextmanager
def rounding_restored():
    """Leaves torch's settings as they were, all that the two functions above change."""
    sure = torch.get_deterministic_debug_mode()
    filled, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cuda.cudnn_sdp_enabled()
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    sums = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(sure)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = sums


def changes_bits(error: Exception) -> bool:
    """Whether this is torch's error for an operation that gives other bits each time."""
    return any(sign in str(error) for sign in ("does not have a deterministic implementation", CUBLAS))


@contextlib.contextmanager
def nondeterminism_reported():
    """Raises UserError where an operation has no deterministic form, instead of torch's RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RunStopped) or not changes_bits(error):
            raise
        if CUBLAS in str(error):
            raise UserError(f"{CUBLAS}={os.environ.get(CUBLAS)}: to give the same bits each time on a GPU it must be "
                            ":4096:8 or :16:8 before a process's first product there; start a new one, or give "
                            "--deterministic false") from error
        raise UserError(f"this model can't give the same bits each time on a GPU ({first_line(error)[:160]}); give "
                        "--deterministic false: a run that goes on does so to rounding then") from error
