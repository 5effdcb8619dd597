"""What the scripts stand on. Nothing in this folder imports a script, and this file imports the
standard library alone."""

import json
import os
import sys
from contextlib import contextmanager, suppress


class UserError(Exception):
    """A mistake that the user can mend. A script prints it as one line and exits with code 2."""


def one_line_errors():
    """Have the script print a mistake of the user's as one line, and exit with code 2. Every other
    error shows its traceback."""
    sys.excepthook = print_error


def print_error(kind, error, trace):
    out_of_memory = kind.__name__ in ("OutOfMemoryError", "MemoryError")  # torch's is known by name
    if kind is UserError:
        code, line = 2, f"error: {error}"
    elif out_of_memory or "can't allocate memory" in str(error):
        reason = (str(error).splitlines() or ["on the host"])[0]
        code, line = 2, f"error: out of memory ({reason}); use fewer rows or tokens at a time"
    elif kind is ModuleNotFoundError:
        code, line = 2, f"error: {error}: pip install {error.name}"
    elif kind is KeyboardInterrupt:
        code, line = 130, "interrupted"
    else:
        return sys.__excepthook__(kind, error, trace)
    # Not sys.stderr: in a process group torch catches what is printed there, and would lose it.
    print(line, file=sys.__stderr__)
    raise SystemExit(code)


@contextmanager
def whole_file(path):
    """Yield a name to write under. It is renamed to `path` when all of it is on the disk. Until
    then, and if the writing fails, the old `path` stays as it was."""
    aside = f"{path}.tmp"
    try:
        yield aside
        with open(aside, "r+b") as f:
            os.fsync(f.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(aside)
        # safetensors raises an error of its own, recognised by name: no package is imported here.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            message = f"{path} cannot be written: {error}; make room, or choose another place"
            raise UserError(message) from None
        raise


@contextmanager
def foreign_file(path):
    """Files come from strangers: whatever a missing or malformed one leads to is a UserError."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except Exception as error:
        message = f"{path} is malformed ({type(error).__name__}: {error}); download it again"
        raise UserError(message) from None


def read_json(path):
    """The content of a JSON file; UserError if it is missing or is no JSON."""
    with foreign_file(path), open(path, encoding="utf-8-sig") as f:
        return json.load(f)
