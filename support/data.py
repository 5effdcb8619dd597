"""Files of data and of responses, and data sets on the hub."""

import csv
import io
import json
import os
from collections.abc import Sequence

from support import UserError, foreign_file, whole_file

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


def is_local(name):
    """Is this a file or a directory, rather than a name on the hub?"""
    return os.path.exists(name) or name.endswith(ENDINGS)


def read_file(path, split=""):
    """[(place, row)] of a data file, or of the file in a directory that is named after the split.
    Raises UserError, naming the file and the row, for what cannot be read."""
    if os.path.isdir(path):
        paths = [os.path.join(path, split + ending) for ending in ENDINGS]
        path = next(filter(os.path.exists, paths), paths[0])
    if not path.endswith(ENDINGS):
        raise UserError(f"'{path}' does not end in {', '.join(ENDINGS)}: convert or unpack it")
    with foreign_file(path), open(path, "rb") as f:
        rows = list(read_rows(path, f.read()))
    for place, row in rows:
        # DictReader puts the fields for which the header has no name under None.
        if not isinstance(row, dict) or None in row:
            raise UserError(f"{place} is no JSON object, or has more fields than the header: put "
                            "quotes around a text with commas")
    return rows


def read_rows(path, data):
    """Yield (place, row) from the bytes of a file. JSON is one array, or an object a line."""
    if path.endswith(".parquet"):
        import pyarrow.parquet  # only here; the datasets library brings it

        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    elif path.endswith(".csv"):  # pandas would turn the answer 007 into 7, and NA into nothing
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    elif data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        rows = json.loads(data)
    else:
        rows = []
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                with foreign_file(f"{path}, line {number}"):
                    yield f"{path}, line {number}", json.loads(line)
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


class HubRows(Sequence):
    """(place, row) of a data set on the hub. Each row is read from the disk when it is asked for,
    so that a million of them take no memory."""

    def __init__(self, path, data):
        self.path, self.data = path, data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return f"{self.path}, row {index}", self.data[index]


def load_hub(name, path, configuration, split):
    """HubRows of a data set that the user calls `name`. Whatever goes wrong is a UserError."""
    try:
        import datasets  # only here: local files do not need it

        return HubRows(path, datasets.load_dataset(path, configuration, split=split))
    except Exception as error:  # of many kinds: the network, the hub, a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"data set '{name}' ({path}, {split}) could not be loaded ({reason}); give "
                        "a .jsonl file or a directory instead") from None


# -------------------------------------------------------------------------------------- responses

def read_responses(path):
    """(settings, {index: rows}) of a file that write_responses began, or of any .jsonl file with
    responses and answers."""
    settings, groups = {}, {}
    for place, row in read_file(path):
        if "settings" in row:
            settings = row["settings"]
            continue
        if not isinstance(row.get("response"), str) or not isinstance(row.get("answer"), str):
            raise UserError(f"{place}: needs a response and an answer, which are texts")
        row = {"tokens": 0, "truncated": False, "index": len(groups)} | row
        groups.setdefault(row["index"], []).append(row)
    return settings, groups


def write_responses(path, settings, groups):
    """A line of settings, then a line for each response."""
    with whole_file(path) as aside:
        write_rows(aside, [{"settings": settings}, *(row for rows in groups for row in rows)], "wb")


def write_rows(path, rows, mode="ab"):
    """Append all lines at once, so that those of several processes do not mix."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        with open(path, mode) as f:
            f.write(lines.encode("utf-8", errors="backslashreplace"))  # half of a surrogate pair
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; make room, then go on with "
                        "--init_from=resume") from None
