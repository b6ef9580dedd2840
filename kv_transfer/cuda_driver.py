"""The few calls of NVIDIA's driver that mapping a peer's memory needs, by ctypes. Used by cuda_ipc.py only.

Signatures are those of the CUDA Driver API reference, sections "Memory Management" and "Primary Context Management".
A handle (CUipcMemHandle, 64 bytes) stands for a whole allocation, and so does what opening it gives. It cannot be had
for memory of torch's expandable segments or of cudaMallocAsync, and not be opened in the process that made it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from penstock.kv_transfer.base import TransportError

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_byte * HANDLE_BYTES),)


class CudaDriver:
    """Calls on behalf of one device, in its primary context, which is the one that torch uses.

    Raises (every method):
        TransportError: the driver says no; the message has its name for the error.
    """

    def __init__(self, device_index: int) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportError(f"there is no NVIDIA driver: {error}") from error
        self._cuda.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint]
        self._call("cuInit", ctypes.c_uint(0))
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), ctypes.c_int(device_index))
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)

    def allocation(self, address: int) -> tuple[int, int]:
        """(address, size in bytes) of the allocation that an address lies in."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        with self._current():
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value, size.value

    def export(self, base: int) -> bytes:
        """The handle of the allocation that begins at `base`."""
        handle = _Handle()
        with self._current():
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(base))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation; its address here."""
        address = ctypes.c_uint64()
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                ctypes.c_uint(_LAZY_PEER_ACCESS),
            )
        return address.value

    def unmap(self, base: int) -> None:
        """Drop a mapping that `open` gave; nothing may be using it."""
        with self._current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def read(self, address: int, size_bytes: int) -> bytes:
        """Memory of the device, by the driver's own copy."""
        host = ctypes.create_string_buffer(size_bytes)
        with self._current():
            self._call("cuMemcpyDtoH_v2", host, ctypes.c_uint64(address), ctypes.c_size_t(size_bytes))
        return host.raw

    def close(self) -> None:
        """Give the context back."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Whatever thread calls: the context is current while it does."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(ctypes.c_int(status), ctypes.byref(text))
            raise TransportError(f"{name}: {(text.value or b'error %d' % status).decode()}")
