"""The page cache under a mapped file, by address: what of it is in memory, bring it there, let it go again.

On Linux from 5.14 on; elsewhere `SUPPORTED` is false, and pages come when they are touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import sys
from pathlib import Path

from planner.units import KIB

# The kernel's numbers, the same for every processor that torch runs on; Python does not name the first.
_MADV_POPULATE_READ = 22
_MADV_PAGEOUT = 21
# What is announced at once: the kernel takes no more of one announcement than one request to the disk holds.
_ANNOUNCED_BYTES = 512 * KIB

# Linux's table of this process's pages, and in the highest byte of an entry what says of which kind a page is.
_PAGE_MAP = Path("/proc/self/pagemap")
_ENTRY_BYTES = 8
_PRESENT, _SWAPPED, _OF_FILE = 1 << 7, 1 << 6, 1 << 5

_LIBRARY = ctypes.CDLL(None, use_errno=True) if platform.system() == "Linux" else None
if _LIBRARY is not None:
    _LIBRARY.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _LIBRARY.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def pages(address: int, nbytes: int) -> tuple[int, int]:
    """Return (address, bytes) of the whole pages that hold so many bytes, of at least one."""
    start = address - address % mmap.PAGESIZE
    return start, -(-(address + nbytes - start) // mmap.PAGESIZE) * mmap.PAGESIZE


def present(address: int, nbytes: int) -> bool:
    """Tell whether all pages of a mapping are in memory; costs about 0.2 ms a GB.

    The kernel says so of every file that the user may not write to, whether or not it is true.
    """
    assert _LIBRARY is not None
    start, length = pages(address, nbytes)
    flags = ctypes.create_string_buffer(length // mmap.PAGESIZE)
    return _LIBRARY.mincore(start, length, flags) == 0 and b"\0" not in flags.raw


def written(address: int, nbytes: int) -> bool | None:
    """Tell whether any page of a private mapping was written to, and so is no longer its file's; None where the kernel
    does not say.
    """
    start, length = pages(address, nbytes)
    count = length // mmap.PAGESIZE
    try:
        with _PAGE_MAP.open("rb", buffering=0) as table:
            table.seek(start // mmap.PAGESIZE * _ENTRY_BYTES)
            found = table.read(count * _ENTRY_BYTES)
    except OSError:
        return None
    if len(found) < count * _ENTRY_BYTES:
        return None
    # Of each page the highest byte alone: a page of the file's that is there says so, and one in swap is never of it.
    kinds = set(found[_ENTRY_BYTES - 1 :: _ENTRY_BYTES] if sys.byteorder == "little" else found[::_ENTRY_BYTES])
    return any(kind & _SWAPPED or (kind & _PRESENT and not kind & _OF_FILE) for kind in kinds)


def bring(address: int, nbytes: int) -> None:
    """Read all pages of a mapping that are not in memory yet, and return when they are. Other threads go on.

    They are announced first, so that the disk has many requests and reads no others: around pages that are missed one
    by one, the kernel reads more than was asked for.

    Raises:
        OSError: they cannot be read, as where the file has become shorter.
    """
    assert _LIBRARY is not None
    start, length = pages(address, nbytes)
    for offset in range(0, length, _ANNOUNCED_BYTES):
        _LIBRARY.madvise(start + offset, min(_ANNOUNCED_BYTES, length - offset), mmap.MADV_WILLNEED)
    while _LIBRARY.madvise(start, length, _MADV_POPULATE_READ):
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number))


def let_go(address: int, nbytes: int) -> None:
    """Free the pages of a mapping, in the page cache too, but for those that were written to or that others map, and up
    to some thirty for each processor, which the kernel lists only later.

    Of files that the user may not write to they stay until the kernel needs the memory.
    """
    assert _LIBRARY is not None
    start, length = pages(address, nbytes)
    _LIBRARY.madvise(start, length, _MADV_PAGEOUT)


def _supported() -> bool:
    if _LIBRARY is None:
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        view = ctypes.c_char.from_buffer(page)
        try:
            bring(ctypes.addressof(view), 1)
        except OSError:
            return False
        finally:
            del view
    return True


SUPPORTED = _supported()
