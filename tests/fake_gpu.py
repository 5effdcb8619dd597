"""A CUDA device that is only pretended. Code written for `cuda` runs on a torch for CPUs, and fails where a GPU would:

    with fake_gpu() as gpu:
        sample.generate(model.load_model(path, device="cuda"), ...)
    gpu.counts  # copies to the device and to the host, other waits for numbers, captures, replays, calls of varlen_attn

A tensor lies on the device if its memory is marked: its storage has an attribute `on_gpu`. torch itself sees tensors of
the CPU only, and two of its modes make the difference. Functions sees every call as Python writes it, such as t.device,
t.to("cuda") or torch.zeros(3, device="cuda"), and answers or rewrites it. Device sees every operation that calls and
backward passes consist of. It raises where devices are mixed, counts what makes the host wait, marks the memory of
results, and records CUDA graphs. Memory from torch.empty holds NaN.

What it cannot show: speed, limits of memory, how the kernels of a GPU round, and races between streams.
"""

import functools
import inspect
import math
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import torch.utils.checkpoint as checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
GIVES_NUMBERS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_"}
NAN = 255  # bytes of 255 are NaN in every floating dtype, and -1 in int64
ANSWERS = {"is_available": True, "device_count": 1, "get_device_capability": (9, 0), "set_device": None,
           "mem_get_info": (8 * 10**9, 8 * 10**9), "memory_reserved": 0, "memory_allocated": 0,
           "max_memory_allocated": 0, "graph_pool_handle": (0, 1), "Stream": None}  # of the functions in torch.cuda


@contextmanager
def fake_gpu():
    """Pretend that there is a GPU. Yields the Device."""
    device = Device()
    functions = Functions(device)

    def engine(*args, real=torch.autograd._engine_run_backward, **kwargs):
        with functions:  # torch has switched it off, but Python code of a backward pass must see it, too
            return real(*args, **kwargs)

    answers = {name: mock.Mock(return_value=answer) for name, answer in ANSWERS.items()}
    graph = functools.partial(Graph, device)
    kernel = functools.wraps(varlen.varlen_attn)(functools.partial(varlen_by_hand, device))  # with its signature
    with (mock.patch.multiple(torch.cuda, CUDAGraph=graph, graph=device.graph, **answers),
          mock.patch.object(torch.backends.cuda, "enable_cudnn_sdp"), mock.patch.object(varlen, "varlen_attn", kernel),
          mock.patch.object(torch.autograd, "_engine_run_backward", engine),
          # Recomputation is compared with the forward pass, but devices only in one of them with the mode on.
          mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=lambda t: (t.shape, t.dtype)),
          functions, device):
        yield device


def lies_on_gpu(t):
    return hasattr(t.untyped_storage(), "on_gpu")


def tensors_in(*things):
    return [leaf for leaf in tree_leaves(things) if isinstance(leaf, torch.Tensor)]


def new_in(result, *inputs):
    """The tensors of a result that do not lie in the memory of an input."""
    known = {t.untyped_storage()._cdata for t in tensors_in(inputs)}
    return [t for t in tensors_in(result) if t.untyped_storage()._cdata not in known]


@contextmanager
def behind_the_scenes():
    """While this is open, the modes see nothing."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class Functions(TorchFunctionMode):
    """Calls as Python writes them. While one is answered the mode is off, so `t.device` is the CPU here."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        Tensor = torch.Tensor
        self.instead = {torch.tensor: self.tensor, Tensor.to: self.to}
        self.instead_on_gpu = {Tensor.device.__get__: lambda t: GPU,
                               Tensor.is_cuda.__get__: lambda t: True,
                               Tensor.cpu: lambda t: self.to(t, "cpu"),
                               Tensor.tolist: lambda t: self.to(t, "cpu").tolist(),
                               torch.mm: self.mm,
                               Tensor.numpy: self.no_numpy,
                               Tensor.__array__: self.no_numpy}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        here = any(map(lies_on_gpu, tensors_in(args, kwargs)))
        instead = self.instead.get(func) or here and self.instead_on_gpu.get(func)
        if instead:
            return instead(*args, **kwargs)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "cuda"
            if here:
                kwargs["device"] = "cpu"
        with self.device.making(here):
            return func(*args, **kwargs)

    def tensor(self, *args, device=None, **kwargs):
        t = torch.tensor(*args, **kwargs)
        return t if device is None else self.to(t, device)

    def to(self, t, *args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            target, dtype = args[0].device, args[0].dtype
            goes_here = lies_on_gpu(args[0])
        else:
            target, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            goes_here = lies_on_gpu(t) if target is None else target.type == "cuda"
        moves = lies_on_gpu(t) != goes_here
        if not moves and not goes_here:
            return t.to(*args, **kwargs)
        assert not (moves and t.requires_grad and torch.is_grad_enabled()), "gradients across devices are not pretended"
        with self.device.making(goes_here):
            return t.to(dtype or t.dtype, copy=moves)

    def mm(self, a, b, out_dtype=None):
        """A CPU cannot keep a product of 16-bit numbers in float32."""
        with self.device.making(True):
            return torch.mm(a, b) if out_dtype is None else torch.mm(a.to(out_dtype), b.to(out_dtype))

    def no_numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Device(TorchDispatchMode):
    """The operations below autograd."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.kernels = 0  # operations that a GPU launches, each of which makes or changes numbers
        self.makes_here = False  # does the present call make its new tensors on the device?
        self.recording = None  # the Graph that is being recorded

    @contextmanager
    def making(self, here):
        before = self.makes_here
        self.makes_here = here
        try:
            yield
        finally:
            self.makes_here = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            with self:  # in inference mode some operations arrive before torch has taken them apart
                result = func.decompose(*args, **kwargs)
            return self.run(func, args, kwargs) if result is NotImplemented else result

    def run(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        tensors = tensors_in(args, kwargs)
        ours = [t for t in tensors if lies_on_gpu(t)]
        is_factory = not tensors or name == "_to_copy" or name.startswith("new_") or name.endswith("_like")
        makes_here = self.makes_here if is_factory else bool(ours)
        if not ours and not makes_here:
            return func(*args, **kwargs)
        self.check(func, name, args, kwargs, [t for t in tensors if not lies_on_gpu(t)])
        writes = func._schema.is_mutable
        if self.recording and writes:
            self.recording.save(ours)
        result = func(*args, **kwargs)
        made = new_in(result, tensors) if makes_here else []
        self.kernels += (writes or bool(made)) and "empty" not in name
        for t in made:
            t.untyped_storage().on_gpu = True
            if "empty" in name:
                t.untyped_storage().fill_(NAN)
        if self.recording and (writes or made):
            self.recording.record(func, args, kwargs, made)
        return result

    def check(self, func, name, args, kwargs, others):
        """Raise if a GPU cannot do this, and count it if it makes the host wait. others: tensors of the host."""
        if name in ("_to_copy", "copy_"):
            goes_here = self.makes_here if name == "_to_copy" else lies_on_gpu(args[0])
            source = args[0] if name == "_to_copy" else args[1]
            if goes_here != lies_on_gpu(source):
                self.wait("to device" if goes_here else "to host")
            return
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool for index in indices):
                self.wait("numbers")
            if not all(map(lies_on_gpu, indices)):
                self.wait("to device")
            others = [t for t in others if not any(t is index for index in indices)]
        if any(t.dim() for t in others) and not name.endswith("_like"):  # single numbers are passed to a kernel
            raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator, in {func}")
        if name in GIVES_NUMBERS or name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.wait("numbers")

    def wait(self, reason):
        """The host waits for the device."""
        if self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing ({reason})")
        self.counts[reason] += 1

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        """In the place of torch.cuda.graph."""
        self.counts["captures"] += 1
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            with behind_the_scenes():
                graph.finish()


class Graph:
    """In the place of torch.cuda.CUDAGraph: a list of operations, and the places of what they read and make."""

    def __init__(self, device):
        self.device = device
        self.operations = []
        self.before = {}  # during the recording: memory that was written to, and what it held

    def save(self, tensors):
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()

    def record(self, func, args, kwargs, made):
        places = tree_map_only(torch.Tensor, lambda t: Place(t) if lies_on_gpu(t) else t, (args, kwargs))
        self.operations.append((func, *places, [Place(t) for t in made]))

    def finish(self):
        """A recording computes nothing. So what it wrote to is as before, and what it made holds NaN until a replay."""
        for storage, content in self.before.values():
            storage.copy_(content)
        self.before.clear()
        for *_, made in self.operations:
            for place in made:
                storage = place.storage()
                if storage is not None:
                    storage.fill_(NAN)

    def replay(self):
        self.device.counts["replays"] += 1
        temporary = {}  # the memory of what nobody has kept
        with behind_the_scenes(), torch.inference_mode():
            for func, args, kwargs, made in self.operations:
                args, kwargs = tree_map_only(Place, lambda place: place.tensor(temporary), (args, kwargs))
                result = func(*args, **kwargs)
                for place, t in zip(made, new_in(result, args, kwargs), strict=True):
                    if place.storage() is None:
                        temporary[place.memory.cdata] = t.untyped_storage()
                    else:
                        place.tensor(temporary).copy_(t)


class Place:
    """What a recording keeps of a tensor: where it lies. That does not keep the memory from being freed."""

    def __init__(self, t):
        self.memory = StorageWeakRef(t.untyped_storage())
        self.dtype = t.dtype
        self.geometry = t.storage_offset(), t.size(), t.stride()

    def storage(self):
        """The memory, or None if it has been freed."""
        return torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)

    def tensor(self, temporary):
        storage = temporary.get(self.memory.cdata, self.storage())
        if storage is None:
            raise RuntimeError("a CUDA graph reads memory that has been freed")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.geometry)


def varlen_by_hand(device, *args, **kwargs):
    """What torch's varlen_attn computes, in float32 and rounded once. It checks what the kernel demands."""
    device.counts["varlen_attn"] += 1
    bound = inspect.signature(varlen.varlen_attn).bind(*args, **kwargs)
    bound.apply_defaults()
    a = SimpleNamespace(**bound.arguments)
    assert a.window_size == (-1, 0) and a.scale is None and getattr(a, "enable_gqa", True)  # causal
    for t in (a.query, a.key, a.value):
        assert t.is_cuda and t.dtype.itemsize == 2 and t.shape[-1] % 8 == 0 and t.stride(-1) == 1
    spans = []
    for ends, longest, rows in ((a.cu_seq_q, a.max_q, a.query), (a.cu_seq_k, a.max_k, a.key)):
        assert ends.is_cuda and ends.dtype == torch.int32 and ends.is_contiguous()
        with behind_the_scenes():  # the kernel reads these numbers on the device
            pairs = ends.unfold(0, 2, 1).tolist()
        assert pairs[0][0] == 0 and pairs[-1][1] == len(rows) and longest == max(end - start for start, end in pairs)
        spans.append([slice(*pair) for pair in pairs])
    out = []
    for of_q, of_k in zip(*spans, strict=True):
        q, k, v = (t.transpose(0, 1).float() for t in (a.query[of_q], a.key[of_k], a.value[of_k]))
        k, v = (t.repeat_interleave(len(q) // len(t), dim=0) for t in (k, v))
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        future = future.triu(1 + k.shape[1] - q.shape[1])  # the last query sees all keys
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1).to(a.query.dtype))
    return torch.cat(out)
