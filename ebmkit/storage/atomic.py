"""Writing a file in one move, so that a crash, a full disk or Ctrl-C never leaves half of one.

The content goes to a temporary file beside the file's place, ``.NAME.RANDOM.partial``, is brought
to the disk, and is then moved over what was there. A process that is killed on the way leaves the
temporary behind and the file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ebmkit.errors import UserError

PARTIAL = ".partial"
"""What the names of temporary files end in; they begin with a dot."""

Content = bytes | memoryview


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()


def make_folder(path: Path) -> None:
    """Make the folder ``path``, and those above it, if they are not there.

    Raises:
        UserError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {str(path)!r}: {error.strerror}") from None


@contextlib.contextmanager
def _or_removed(temporary: str | Path) -> Iterator[None]:
    """Remove the file ``temporary`` if something fails within."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def stage(path: Path, content: Content) -> Path:
    """Write ``content`` to a temporary file beside ``path``, down to the disk; its path.

    Raises:
        OSError: if it cannot be written; nothing is left behind then.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    with _or_removed(temporary):
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_UMASK)
    return Path(temporary)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within, a temporary file beside ``path`` to write, which then takes its place in one move.

    Raises:
        UserError: if it cannot be written; nothing is left behind then.
    """
    with writing(path):
        temporary = stage(path, b"")
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def replace_file(path: Path, content: Content) -> None:
    """Put ``content`` in the place of ``path``, in one move.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    temporary = stage(path, content)
    with _or_removed(temporary):
        os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in ``folder`` to the disk; where a file system cannot, nothing happens.

    Raises:
        OSError: if the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that one may write into and not read, or none that can be opened
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "write to another disk",
    errno.EACCES: "check the folder's permissions",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell of an `OSError` within as of ``path``, which could not be written.

    Raises:
        UserError: then.
    """
    try:
        yield
    except OSError as error:
        advice = f" ({_ADVICE[error.errno]})" if error.errno in _ADVICE else ""
        message = f"cannot write {str(path)!r}: {error.strerror or error}{advice}"
        if not path.parent.is_dir():
            raise UserError(f"{message}: the folder is not there (moved, or removed?)") from error
        raise UserError(f"{message}; what was there before is untouched") from error


def free_name(path: Path) -> Path:
    """``path`` if nothing has that name, else the first free of NAME-2.SUFFIX, NAME-3.SUFFIX..."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())
