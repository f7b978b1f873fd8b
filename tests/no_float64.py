# SPDX-License-Identifier: Apache-2.0
"""A pretended device without float64, as Apple's GPUs are: computed on the CPU, strict about dtypes and devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""What the tensors say of themselves: a kind of device that every torch knows."""


class OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`; its values are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r})"


class Pretended(TorchDispatchMode):
    """Makes what is asked for on `DEVICE`; counts the operations that ran there."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += any(isinstance(x, OnDevice) for x in tree_flatten((args, kwargs or {}))[0])
        return _run(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """`torch.tensor` makes its values before anything is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in flat if isinstance(x, OnDevice)]
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    # An operation takes scalars from the CPU, and copies between devices.
    if ours and "copy" not in str(func) and any(x.ndim and not isinstance(x, OnDevice) for x in flat):
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on the CPU")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    on_device = device.type == DEVICE.type if device is not None else bool(ours)
    if func is torch.ops.aten.copy_.default:
        on_device = isinstance(args[0], OnDevice)
    if not on_device:
        return out
    same = {id(x.inner): x for x in ours}  # what was written in place is given back as it was

    def wrapped(x: Any) -> Any:
        return (same[id(x)] if id(x) in same else OnDevice(x)) if isinstance(x, Tensor) else x

    return tree_map(wrapped, out)


@contextmanager
def pretended_device() -> Iterator[Pretended]:
    """Within it, `DEVICE` can be used; attention is computed step by step, as there."""
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    no_autocast = patch.object(torch, "autocast", nullcontext_for), patch.object(torch, "is_autocast_enabled", bool_of)
    with plain_attention, no_autocast[0], no_autocast[1], Made(), Pretended() as mode:
        yield mode


def nullcontext_for(*_: Any, **__: Any) -> Any:
    """Stands for `torch.autocast`, which does not know the device."""
    return nullcontext()


def bool_of(*_: Any) -> bool:
    """Stands for `torch.is_autocast_enabled`, likewise."""
    return False


def put(module: Any) -> Any:
    """Moves a module to `DEVICE`, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter, OnDevice):
                part._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, OnDevice):
                part._buffers[name] = OnDevice(buffer)
    return module
