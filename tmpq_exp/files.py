"""Files that are written whole or not at all, and what a user can do where they cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Make it writable"),
}


def remedy(error: OSError) -> str | None:
    """What makes a file writable that could not be written; None if the error is of another kind."""
    return None if error.errno is None else _REMEDIES.get(error.errno)


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new, never a part, also after a power cut."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
