"""Low-bit products by OpenVINO, where a machine asks for them: activations in 8 bits, and for each row the same bits
whatever rows come with it. OpenVINO is optional and is looked for only here; knows no models.

It packs a weight for itself and keeps what it was given, too, for as long as it lives. What it is given therefore lies
in a file without a name (in TMPDIR): those pages cost no memory, and rows are still looked up in them.
"""

from __future__ import annotations

import mmap
import tempfile
from functools import cache
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from splitwise_llm.errors import ModelError, RequestError
from splitwise_llm.spec import INT4_GROUP, Weights
from splitwise_llm.units import show_bytes

ROWS = 32
"""Multiplied in one call. OpenVINO keeps the outputs of the largest call for each weight, for ever: with 64 rows a
prompt is up to 1.13 times as fast, and int4 weights take a quarter more memory for it."""
INT8_GROUPS = (128, 64, 32)
"""Activations that share a scale beside int8 weights: the largest that divides the columns is the fastest."""
INT4_STEPS = (-8.25, -7.75, -8.5, -7.25)
"""What the largest weight of a group may become before rounding; the one with the least square error is taken."""
INSTALL = "pip install 'splitwise-llm[openvino]'"


class _Package(Protocol):
    """What is used of the package, whose types mypy does not know."""

    Core: Any
    Model: Any
    Shape: Any
    Tensor: Any
    Type: Any
    opset13: Any


@cache
def openvino() -> _Package:
    """The package. Raises RequestError, saying what to install, where it is missing."""
    try:
        import openvino as package  # noqa: PLC0415 - optional, and nobody else pays for it
    except ImportError as error:
        raise RequestError(f"--kernels openvino needs OpenVINO: {INSTALL} ({error})") from error
    return cast(_Package, package)


def check_openvino(weights: Weights, device: torch.device) -> None:
    """Raise RequestError unless OpenVINO is here and serves such weights."""
    if weights is Weights.FULL:
        raise RequestError("--kernels openvino is for low-bit weights: add --weights int8 or int4, or leave it out")
    if device.type != "cpu":
        raise RequestError(f"--kernels openvino computes on the processor, and this machine on {device}: leave it out")
    openvino()


@cache
def _core() -> Any:
    return openvino().Core()


class Kept:
    """Numbers in a file without a name, which OpenVINO and lookups read; who has packed them may forget the pages.
    Raises ModelError where the file has no room."""

    def __init__(self, values: Tensor) -> None:
        try:
            with tempfile.TemporaryFile() as file:
                file.write(values.contiguous().numpy().data)
                file.flush()
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            where, size = tempfile.gettempdir(), show_bytes(values.nbytes)
            raise ModelError(
                f"with OpenVINO, weights are kept in {where} too, and {size} more of them do not fit there ({error}); "
                "point TMPDIR to a disk with room"
            ) from error
        self.array = np.frombuffer(self._memory, values.numpy().dtype).reshape(values.shape)
        self.tensor = torch.from_numpy(self.array)
        self.nbytes = values.nbytes

    def forget_pages(self) -> None:
        """Take no memory until somebody reads here again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


class Product:
    """x @ weight.T for a weight (out, in) that OpenVINO has packed; called by one thread at a time."""

    def __init__(self, shape: torch.Size, weight: Any, group: int) -> None:
        """`weight` is a node of OpenVINO's graph, fp32 of that shape; `group` activations share a scale."""
        ov = openvino()
        outputs, inputs = shape
        x = ov.opset13.parameter([-1, inputs], ov.Type.f32)
        y = ov.opset13.matmul(x, weight, transpose_a=False, transpose_b=True)
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # other processes want the cores, too
            "INFERENCE_PRECISION_HINT": "f32",  # of the sums; the activations are rounded as below
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        }
        self._request = _core().compile_model(ov.Model([y], [x]), "CPU", options).create_infer_request()
        self._x, self._y = torch.zeros(1, inputs), torch.zeros(1, outputs)
        self._bind(self._x, self._y)
        self._request.infer()  # only now it packs

    def __call__(self, x: Tensor) -> Tensor:
        """x (rows, in) to (rows, out), in the dtype of x."""
        if len(x) == 1:
            self._x.copy_(x)
            self._request.infer()
            return self._y.to(x.dtype, copy=True)
        y = torch.empty(len(x), self._y.shape[1])
        for some, into in zip(torch.split(x.float().contiguous(), ROWS), torch.split(y, ROWS), strict=True):
            self._bind(some, into)
            self._request.infer()
        self._bind(self._x, self._y)
        return y.to(x.dtype)

    def _bind(self, x: Tensor, y: Tensor) -> None:
        tensor = openvino().Tensor
        self._request.set_input_tensor(tensor(x.numpy(), shared_memory=True))
        self._request.set_output_tensor(tensor(y.numpy(), shared_memory=True))


def int8_product(values: Kept, scale: Tensor) -> Product:
    """By values (out, in) int8, of columns in multiples of 32, times a scale (out,) fp32."""
    op = openvino().opset13
    weight = op.multiply(op.convert(_constant(values.array), "f32"), op.constant(scale.unsqueeze(1).numpy()))
    group = next(group for group in INT8_GROUPS if values.array.shape[1] % group == 0)
    product = Product(values.tensor.shape, weight, group)
    values.forget_pages()
    return product


def int4_product(packed: Kept, scale: Kept) -> Product:
    """By values -8..7 (out, in / 2), as `pack_int4` packs them, times a scale (out, in / 32) fp32."""
    ov = openvino()
    op = ov.opset13
    outputs, groups = scale.array.shape
    values = ov.Tensor(packed.array, ov.Shape([outputs, groups, INT4_GROUP]), ov.Type.i4)
    grouped = op.convert(op.constant(values, shared_memory=True), "f32")
    scaled = op.multiply(grouped, _constant(scale.array.reshape(outputs, groups, 1)))
    shape = torch.Size([outputs, groups * INT4_GROUP])
    product = Product(shape, op.reshape(scaled, op.constant(np.array(shape)), special_zero=False), INT4_GROUP)
    packed.forget_pages()
    scale.forget_pages()
    return product


def pack_int4(values: Tensor) -> Tensor:
    """int8 (out, in) of -8..7 to bytes (out, in / 2), even columns in their low halves."""
    return values[:, ::2] & 15 | values[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    return torch.stack([packed << 4 >> 4, packed >> 4], 2).flatten(1)


def quantise_int4_without_zero(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (rows, columns) to values -8..7, int8, and a scale per 32, fp32 (rows, groups).

    OpenVINO takes a fifth longer where there is a zero. Relative error of Gaussian weights 0.082 (0.086 without
    choosing among scales), of heavy tails 0.112 (0.116).
    """
    groups = weight.view(len(weight), -1, INT4_GROUP)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    values, scale, least = torch.zeros_like(groups), torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for steps in INT4_STEPS:
        tried = largest / steps
        rounded = groups.div(tried.where(tried != 0, 1)).round_().clamp_(-8, 7)
        error = torch.addcmul(groups, rounded, tried, value=-1).square_().sum(2, keepdim=True)
        better = error < least
        values, scale, least = (
            new.where(better, old) for new, old in ((rounded, values), (tried, scale), (error, least))
        )
    return values.flatten(1).to(torch.int8), scale.squeeze(2)


def _constant(array: Any) -> Any:
    """A constant that shares the memory of a numpy array."""
    ov = openvino()
    return ov.opset13.constant(ov.Tensor(array, shared_memory=True), shared_memory=True)
