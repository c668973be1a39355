"""Plain numbers of models, devices and links, in SI units; knows nothing of how any of them works inside."""

from splitwise_llm.spec.device import DeviceSpec
from splitwise_llm.spec.formats import INT4_GROUP, Dtype, Kernels, Weights
from splitwise_llm.spec.link import LinkSpec
from splitwise_llm.spec.model import FAMILIES, ModelSpec
from splitwise_llm.spec.shipped import (
    device_sources,
    find_device,
    find_model,
    parse_emulation,
    shipped_devices,
    shipped_models,
)

__all__ = [
    "FAMILIES", "INT4_GROUP", "DeviceSpec", "Dtype", "Kernels", "LinkSpec", "ModelSpec", "Weights", "device_sources",
    "find_device", "find_model", "parse_emulation", "shipped_devices", "shipped_models",
]  # fmt: skip
