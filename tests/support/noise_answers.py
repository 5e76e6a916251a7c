"""Known answers of the noise, the same on every processor. ``tests/cpp/kernels.cpp`` makes these problems in C++."""

import torch
from undo_kernels.noise_segments import Segment

COUNT = 70001  # more than one chunk, in runs that lie apart
KNOWN = {  # digests
    "uniform float32": "8d679c05f9214d14",
    "normal float32": "e6fe1b49b45868d1",
    "constant float32": "2bdf573dc41ead40",
    "uniform bfloat16": "1d8de0ac7615acca",
    "uniform bfloat16 stochastic": "104dfff9f141d434",
    "normal bfloat16": "d5fc0e6c2f405868",
    "normal bfloat16 stochastic": "d6165c8f031eabe5",
    "constant bfloat16": "67c999eb914ff4c5",
    "constant bfloat16 stochastic": "fcd5b0f50b21e7a6",
    "uniform float16": "5dbd83d6161efa97",
    "uniform float16 stochastic": "516f5745af8c7c49",
    "normal float16": "c5d1e34ca73a5471",
    "normal float16 stochastic": "c9c8a1352ecd31de",
    "constant float16": "bdbd821157af4adb",
    "constant float16 stochastic": "d3dba970c3a20bf2",
    "uniform float64": "b183383f68eb0bde",
    "normal float64": "3dbbf94f156cc7bf",
    "constant float64": "84d192dc69d87ec1",
}


def digest(tensor):
    """Sum of the 16-bit words of a tensor, each times an odd number that depends on its place, modulo 2**64."""
    words = tensor.view(torch.int16).long() & 0xFFFF
    return int((words * ((2 * torch.arange(len(words)) + 1) * 0x1E3779B97F4A7C15)).sum()) & 0xFFFFFFFFFFFFFFFF


def parameter(dtype):
    """The tensor that the noise is added to: no generator of random numbers, which another version may change."""
    index = torch.arange(COUNT)
    x = ((index * 2654435761 & 0xFFFFFFFF).double() - 2147483647.5) / 2147483648
    if dtype == torch.bfloat16:  # cut off, not rounded
        return (x.float().view(torch.int32) >> 16).to(torch.int16).view(dtype)
    return (0x2000 + index % 0x1C00).to(torch.int16).view(dtype) if dtype == torch.float16 else x.to(dtype)


def digests(dtype, noise_):
    """Returns what a backend's ``noise_`` makes of the problems of a dtype, as digests by the names that the C++ program prints."""
    name, found = str(dtype).removeprefix("torch."), {}
    for law in ("uniform", "normal", "constant"):
        for stochastic in (False, True) if dtype.itemsize == 2 else (False,):
            theta = parameter(dtype)
            noise_([Segment(theta, "w", law, 0.7, 0.2 / 2**24 if law == "uniform" else 0.3, 5, 1000, 1503)], 3, stochastic)
            found[f"{law} {name}{' stochastic' if stochastic else ''}"] = f"{digest(theta):016x}"
    return found
