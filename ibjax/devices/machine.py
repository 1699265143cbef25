"""What this machine computes with: the devices in words, and accelerators that are there but not used."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

import jax

GPUS, TPUS = ("/dev/nvidia[0-9]*", "/dev/dxg"), ("/dev/accel[0-9]*",)  # device files; dxg is WSL's
VFIO, VENDORS, GOOGLE = "/dev/vfio/[0-9]*", "/sys/bus/pci/devices/*/vendor", "0x1ae0"  # newer TPUs, and other devices
NETWORK = "0x02"  # how the PCI class of a network card begins; Google's cloud has its own


def hardware() -> str:
    """The devices in words, such as "8 × NVIDIA H100 (2 processes)" or "1 × cpu, 2 cores"."""
    device = jax.devices()[0]
    text = f"{jax.device_count()} × {device.device_kind}"
    if device.platform == "cpu":
        text += f", {os.cpu_count()} cores"
    return text + (f" ({jax.process_count()} processes)" if jax.process_count() > 1 else "")


def unused() -> Iterator[tuple[str, str]]:
    """(name, JAX's platform) of each kind of accelerator whose device files are here while JAX computes on the CPU."""
    if jax.default_backend() == "cpu":
        if any(map(glob.glob, GPUS)):
            yield "GPU of NVIDIA", "cuda"
        if _has_tpu():
            yield "TPU", "tpu"


def _has_tpu():
    if any(map(glob.glob, TPUS)):
        return True
    return bool(glob.glob(VFIO)) and any(map(_is_tpu, map(Path, glob.glob(VENDORS))))


def _is_tpu(vendor):
    kind = vendor.with_name("class")
    network = kind.is_file() and kind.read_text(encoding="utf-8").startswith(NETWORK)
    return vendor.read_text(encoding="utf-8").strip() == GOOGLE and not network
