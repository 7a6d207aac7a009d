"""A GPU without a GPU: fake CUDA tensors that know their values, and a list of what crosses between host and device.

Every op on a CUDA tensor runs twice: on torch's FakeTensors, which refuse operands on different devices and take the
fake implementation of our ops, and on the values, kept on the CPU. So a forward on "cuda" has results that can be
compared, and what would wait for a real GPU can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
READS = {  # without a tensor on the CPU as their result
    aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.item.default,
    aten.allclose.default,
}  # fmt: skip

NUMBERS = {Tensor.__int__: int, Tensor.__index__: int, Tensor.__float__: float, Tensor.__bool__: bool}


class FakeCuda(TorchDispatchMode):
    """The mode of `fake_cuda`, inside which `device="cuda:0"` works.

    reads    device to host: every one of them waits for the device
    uploads  host to device, without waiting
    waits    host to device, waiting for all that was asked of the device before
    ops      names of the ops that ran on the device
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.clear()

    def clear(self) -> None:
        self.reads: list[str] = []
        self.uploads: list[str] = []
        self.waits: list[str] = []
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        target = kwargs.get("device")
        if not any(map(on_cuda, tensors)) and (target is None or torch.device(target).type == "cpu"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten.lift_fresh.default:
            return args[0]
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode it comes here before it is taken apart
                return func.decompose(*args, **kwargs)
        self.ops.append(str(func))
        mixed = {t.device.type for t in tensors if t.ndim}
        if len(mixed) > 1 and "index" in str(func):  # some of them copy the index without a word, others fail
            raise RuntimeError(f"{func} of tensors on {sorted(mixed)}")
        on_host = self._crosses(func, args, kwargs)
        unknown = torch.Tag.dynamic_output_shape in func.tags and not _known_size(func, tensors)
        if unknown:
            self.reads.append(str(func))  # the host must know how large the result is
        elif not on_host:
            fake_args, fake_kwargs = tree_map(lambda t: self.fake.from_tensor(t) if _on_cpu(t) else t, (args, kwargs))
            fakes = func(*fake_args, **fake_kwargs)
        value_args, value_kwargs = tree_map(value_of, (args, kwargs))
        if target is not None:
            value_kwargs["device"] = CPU
        with unset_fake_temporarily():
            values = func(*value_args, **value_kwargs)
        if on_host:
            return values
        return tree_map(self.of, values) if unknown else tree_map(_with_value, fakes, values)

    def _crosses(self, func, args, kwargs) -> bool:
        """Note what moves between host and device; whether the result is on the host."""
        if func in READS:
            self.reads.append(str(func))
            return True
        if func is aten._to_copy.default:
            source, target = args[0], kwargs.get("device")
        elif func is aten.copy_.default:
            source, target = args[1], args[0].device
        else:
            return False
        if target is None or torch.device(target).type == source.device.type:
            return False
        if on_cuda(source):
            self.reads.append(str(func))
            return True
        blocks = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        (self.waits if blocks else self.uploads).append(f"{func} {list(source.shape)}")
        return False

    def of(self, value: Tensor) -> Tensor:
        """`value`, a tensor on the CPU, as one on the device, without counting the way there."""
        with self.fake:
            out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        return _with_value(out, value)

    def move(self, module: nn.Module) -> nn.Module:
        """A module with its parameters and buffers on the device, in place."""
        moved: dict[int, Tensor] = {}  # tied ones stay tied
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None:
                    moved.setdefault(id(p), nn.Parameter(self.of(p.detach()), requires_grad=False))
                    part._parameters[name] = moved[id(p)]
            for name, b in part._buffers.items():
                part._buffers[name] = None if b is None else self.of(b)
        return module


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    mode = FakeCuda()
    # FakeTensor's own would read element by element; torch's reads a tensor at once.
    at_once = mock.patch.object(FakeTensor, "tolist", lambda t: t.cpu().tolist())
    with at_once, mode.fake, Brackets(), mode:  # under torch's fake mode nothing initialises CUDA
        yield mode


class Brackets(TorchFunctionMode):
    """x[...], int(x), x.nonzero() and others by ops: torch's own ask for a driver first, even for a fake tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in NUMBERS and on_cuda(args[0]):
            return NUMBERS[func](aten._local_scalar_dense.default(args[0]))
        if func not in (Tensor.__getitem__, Tensor.__setitem__) or not on_cuda(args[0]):
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError as error:
                if "not linked with support for cuda" not in str(error):
                    raise
                name = {"__invert__": "bitwise_not"}.get(func.__name__, func.__name__)
                return getattr(aten, name)(*args, **(kwargs or {}))
        view, indices = _basic(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        if func is Tensor.__getitem__:
            return aten.index.Tensor(view, indices) if indices else view
        value = args[2]
        if indices:
            value = value if isinstance(value, Tensor) else torch.full((), value, dtype=view.dtype, device=view.device)
            return aten.index_put_.default(view, indices, value)
        return (aten.copy_ if isinstance(value, Tensor) else aten.fill_)(view, value)


def _basic(view: Tensor, index: tuple) -> tuple[Tensor, list[Tensor | None]]:
    """The part of an index that makes a view, done; what is left for `aten.index`."""
    used = sum(getattr(i, "ndim", 1) if getattr(i, "dtype", None) is torch.bool else i is not None for i in index)
    if (dots := next((at for at, i in enumerate(index) if i is ...), None)) is not None:
        index = (*index[:dots], *[slice(None)] * (view.ndim - used + 1), *index[dots + 1 :])
    dim, indices = 0, []
    for i in index:
        if i is None:
            view = view.unsqueeze(dim)
        elif isinstance(i, slice):
            start, stop = (
                aten._local_scalar_dense.default(n) if isinstance(n, Tensor) else n for n in (i.start, i.stop)
            )
            view = aten.slice.Tensor(view, dim, start, stop, i.step or 1)
        elif isinstance(i, int):
            view = view.select(dim, i)
            continue
        else:  # torch moves a list to the device, and waits
            i = i if isinstance(i, Tensor) else torch.tensor(i).to(view.device)
            indices += [None] * (dim - len(indices)) + [i]
        dim += getattr(i, "ndim", 1) if getattr(i, "dtype", None) is torch.bool else 1
    return view, indices


def on_cuda(t: object) -> bool:
    return isinstance(t, FakeTensor) and t.fake_device.type == "cuda"


def _on_cpu(t: object) -> bool:
    return isinstance(t, Tensor) and not on_cuda(t)


def value_of(t: object) -> object:
    """What a fake tensor holds; everything else as it is."""
    return t.held if isinstance(t, FakeTensor) else t


def _with_value(fake: object, value: object) -> object:
    if isinstance(fake, FakeTensor):
        assert fake.shape == value.shape and fake.dtype == value.dtype, "a fake implementation is wrong"
        fake.held = value
    return fake


def _known_size(func, tensors: list[Tensor]) -> bool:
    # Indexing has the tag for its bool masks alone.
    return func is aten.index.Tensor and not any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
