"""What the scripts stand on. Nothing in this folder imports a script, and this file imports the
standard library alone."""

import json
import os
import sys
from contextlib import contextmanager, suppress


class UserError(Exception):
    """A mistake that the user can mend. A script prints it as one line and exits with code 2."""


def one_line_errors():
    """Have the script print a mistake of the user's as one line, and exit with code 2."""
    sys.excepthook = print_error


def print_error(kind, error, trace):
    """What replaces sys.excepthook. An error that is not listed here shows its traceback."""
    if kind is UserError:
        line = f"error: {error}"
    elif "OutOfMemory" in kind.__name__ or "can't allocate memory" in str(error):  # torch's errors
        reason = str(error).partition("\n")[0]
        line = f"error: out of memory ({reason}); use fewer rows or tokens at a time"
    elif kind is ModuleNotFoundError:
        line = f"error: {error}: pip install {error.name}"
    elif kind is KeyboardInterrupt:
        line = "interrupted"
    else:
        return sys.__excepthook__(kind, error, trace)
    # Not sys.stderr: in a process group torch catches what is printed there, and would lose it.
    print(line, file=sys.__stderr__)
    raise SystemExit(130 if kind is KeyboardInterrupt else 2)


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
    except Exception as error:
        # safetensors raises an error of its own, recognised by name: no package is imported here.
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        message = f"{path} cannot be written: {error}; make room, or choose another place"
        raise UserError(message) from None
    finally:
        with suppress(OSError):  # it is still there only if the writing failed
            os.remove(aside)


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
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is malformed ({reason}); download it again") from None


def read_json(path):
    """The content of a JSON file; UserError if it is missing or is no JSON."""
    with foreign_file(path), open(path, encoding="utf-8-sig") as f:
        return json.load(f)
