"""Which device to compute on, and how much memory it has."""

import ctypes
import platform
import resource
import sys

import torch

from support import UserError, one_line_errors

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    one_line_errors()
    raise UserError(f"torch 2.11 or newer is needed, and this is {torch.__version__}: "
                    "pip install -r requirements.txt")

# MKL chooses the code of these functions in their first call. If two threads make it at once, one
# may get code that is accurate to 4 digits only (pytorch issue 188792). So it is made here.
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt):
    function(torch.ones(1))


def pick_device(device="auto"):
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=device).device  # "cuda" becomes "cuda:0"
    except (RuntimeError, AssertionError):
        message = f"device '{device}' is not available here; use --device=auto, cpu or cuda"
        raise UserError(message) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # cuDNN's attention, the first choice on Hopper, was seen to be wrong with fewer than 8 key
        # heads and to give NaN with masks (pytorch issues 193893, 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        # By default long sums in bfloat16 are cut into parts that are rounded one by one.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif platform.libc_ver()[0] == "glibc":
        # By default glibc returns large freed blocks to the system, and fetches them again page by
        # page. With a vocabulary of 152k that is a tenth of the time of sampling.
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**26)  # M_MMAP_THRESHOLD: keep blocks of up to 64 MB,
        libc.mallopt(-1, 2**28)  # M_TRIM_THRESHOLD: and 256 MB of them at the end of the heap
    return device


def free_memory(device):
    """Bytes that can still be allocated on a GPU, or on the host (4 GB if the system is silent)."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        with open("/proc/meminfo") as f:
            sizes = dict(line.split(":") for line in f)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 4 * 10**9


def peak_gb(device):
    """Peak memory of this process so far in GB: of the GPU, or else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
