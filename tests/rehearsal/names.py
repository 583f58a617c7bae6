"""Translate "cuda" to the rehearsed device and back, where Python calls torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rehearsal import graphs
from rehearsal.events import note
from rehearsal.tensors import CPU, CUDA, HERE, NAME, DeviceTensor

_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def there(x: Any) -> Any:
    """The rehearsed device for "cuda"; anything else as it is."""
    if isinstance(x, torch.device):
        return HERE if x.type == "cuda" else x
    if isinstance(x, str) and x.partition(":")[0] == "cuda":
        return HERE
    return x


class Names(TorchFunctionMode):
    """Active from `start` on."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = bool(args) and isinstance(args[0], DeviceTensor)
        if func == _DEVICE:
            return CUDA if ours else func(*args)
        if func == _IS_CUDA:
            return ours
        if func is torch.device:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if ours and (special := _ON_DEVICE.get(name)) is not None:
            return special(*args, **kwargs)
        if ours and func == _SET_DATA:
            func(*args)
            args[0].hold(args[1].inner)
            return None
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return _made_of_data(func, args, kwargs)
        if name == "cuda" and args and isinstance(args[0], Tensor):
            return args[0].to(HERE)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": there(kwargs["device"])}
        if any(isinstance(x, (torch.device, str)) for x in args):
            args = tuple(there(x) for x in args)
        return func(*args, **kwargs)


def _made_of_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensors from data of the host are made there, then copied."""
    device = there(kwargs.get("device"))
    if not isinstance(device, torch.device) or device.type != NAME:
        return func(*args, **kwargs)
    rest = {k: v for k, v in kwargs.items() if k not in ("device", "requires_grad")}
    if isinstance(args[0], Tensor):
        return args[0].to(HERE, rest.get("dtype"))
    made = func(*args, **rest, device=CPU).to(HERE)
    return made.requires_grad_() if kwargs.get("requires_grad") else made


def _new_tensor(like: DeviceTensor, data: Any, dtype: Any = None, **_: Any) -> Tensor:
    return torch.tensor(data, dtype=dtype or like.dtype).to(HERE)


def _set_item(x: DeviceTensor, index: Any, value: Any) -> None:
    # torch makes the tensor of a number on the host for CUDA, on the device for other back ends.
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=x.dtype)
    Tensor.__setitem__(x, index, value)


def _to_list(x: DeviceTensor) -> Any:
    for kind in ("copies", "syncs"):
        note(kind, "tolist")
    graphs.forbid("tolist")
    return x.inner.tolist()


def _refuse_numpy(x: DeviceTensor, *_: Any, **__: Any) -> Any:
    raise TypeError(
        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
        "host memory first."
    )


_ON_DEVICE: dict[str, Any] = {
    "data_ptr": lambda x: x.inner.data_ptr(),
    "is_pinned": lambda x, *_, **__: False,
    "new_tensor": _new_tensor,
    "__setitem__": _set_item,
    "tolist": _to_list,
    "numpy": _refuse_numpy,
    "__array__": _refuse_numpy,
    "cudnn_convolution_relu": lambda x, w, b, stride, padding, dilation, groups: F.conv2d(
        x, w, b, stride, padding, dilation, groups
    ).relu(),
    "cudnn_convolution_add_relu": lambda x, w, z, alpha, b, stride, padding, dilation, groups: (
        F.conv2d(x, w, b, stride, padding, dilation, groups) + alpha * z
    ).relu(),
}
