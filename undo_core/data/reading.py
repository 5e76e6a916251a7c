"""Reads documents and records from files and from the Hugging Face hub.

:mod:`undo_core.io.text_files` says what counts as text in every format. No character is replaced, and nothing is left out
except documents of white space alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from undo_core.io.text_files import check_is_content, checked_text, text_lines

HUB = "hf://"
BATCH_ROWS = 1024  # rows of a Parquet file that are read at a time
ENDINGS = {"text": (".txt", ".jsonl", ".parquet"), "records": (".jsonl", ".parquet")}


def read_documents(sources: Iterable[str], *, field: str = "text") -> Iterator[str]:
    """Yields the documents of every source, in order; documents of white space alone are left out.

    Args:
        sources: ``.txt`` (one document per line), ``.jsonl`` (``field`` of every line), ``.parquet`` (column ``field``), or
            ``hf://name[:config[:split]][#field]``, streamed with Hugging Face ``datasets`` (the extra ``undo-core[data]``).
        field: name of the field with the text.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown ending, a malformed line, a missing field, a source without a document, or something that is not
            text (see :func:`undo_core.io.text_files.checked_text`). The error names file and row.
        ImportError: a package is missing; the error names the command that installs it.
    """
    for source in map(str, sources):
        empty = True
        for document in _documents(source, field):
            if document.strip():
                empty = False
                yield document
        if empty:
            raise ValueError(f"{source}: got no document, wanted at least one line of text")


def _documents(source: str, field: str) -> Iterator[str]:
    if Path(source).suffix == ".txt" and not source.startswith(HUB):
        for number, line in text_lines(_existing(source, "data", "text")):
            yield checked_text(line, f"{source}, line {number}")
        return
    hub, _, named = source.partition("#") if source.startswith(HUB) else (source, "", "")
    field = named or field
    for place, record in read_records(hub, "data", split="train", accepts="text", column=field):
        where = f"{source}, {place}"
        if not isinstance(record, Mapping) or field not in record:
            got = f"the fields {', '.join(record)}" if isinstance(record, Mapping) else type(record).__name__
            raise ValueError(f"{where}: got no text in the field {field!r} ({got}), wanted a record with that field")
        yield checked_text(record[field], where, field)


def read_records(
    source: str, argument: str, *, split: str, accepts: str = "records", column: str | None = None
) -> Iterator[tuple[str, Any]]:
    """Yields every record of a JSONL or Parquet file or of a data set on the hub, with its place (``line 3``, ``row 3``).

    Args:
        source: path, or ``hf://name[:config[:split]]``.
        argument: name of the setting, for errors.
        split: split of the hub's data set, if the source names none.
        accepts: "text" or "records": the endings that an error lists.
        column: the only column to read from Parquet, which must hold text; None reads all columns.

    Raises:
        FileNotFoundError, ValueError, ImportError: as :func:`read_documents`.
    """
    if source.startswith(HUB):
        for number, record in enumerate(_hub_records(source, split), 1):
            yield f"row {number}", record
        return
    path = _existing(source, argument, accepts)
    if path.suffix == ".jsonl":
        for number, line in text_lines(path):
            if line.strip():
                where = f"line {number}"
                if "\0" in line:  # JSON would escape it, so this is not JSON or has another encoding
                    checked_text(line, f"{path}, {where}")
                yield where, _json(line, f"{path}, {where}")
    elif path.suffix == ".parquet":
        yield from _parquet_records(path, column)
    else:
        raise ValueError(f"{path}: got the ending {path.suffix!r}, wanted {_listed(accepts)}")


def _existing(source: str, argument: str, accepts: str) -> Path:
    path = Path(source)
    if not path.is_file():
        hub = f"{HUB}name[:config[:split]]{'[#field]' if accepts == 'text' else ''}"
        wanted = f"{', '.join(ENDINGS[accepts])} or {hub}"
        raise FileNotFoundError(f"{argument}: got {path}, which is not a file; wanted {wanted}")
    return path


def _listed(accepts: str) -> str:
    *most, last = ENDINGS[accepts]
    return f"{', '.join(most)} or {last}"


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises a plain ValueError
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}: not JSON ({reason}); wanted one object a line") from None


def _parquet_records(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow; pip install 'undo-core[data]'") from None
    check_is_content(path)
    number = 0  # rows read so far
    try:
        schema = pyarrow.parquet.read_schema(path)
        if column is not None:
            _check_column(path, schema, column)
        # A column that repeats one long text stays as small in memory as in the file: it is read as a dictionary, in small batches.
        texts = [
            name
            for name in schema.names
            if column in (None, name) and schema.field(name).type in (pyarrow.string(), pyarrow.large_string())
        ]
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)
        for batch in file.iter_batches(BATCH_ROWS, columns=None if column is None else [column]):
            for at in range(batch.num_rows):
                number += 1
                values = {name: values[at].as_py() for name, values in zip(batch.schema.names, batch.columns, strict=True)}
                yield f"row {number}", values
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, row {number}: got bytes that are not UTF-8 ({error.reason}); wanted UTF-8") from None
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{path}, after row {number}" if number else f"{path}"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: not Parquet, or cut off or damaged ({reason}); wanted a whole Parquet file") from None


def _check_column(path: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    if schema.names.count(column) != 1:
        raise ValueError(f"{path}: got the columns {', '.join(schema.names)}, wanted one named {column!r}")
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    known = (types.is_string, types.is_large_string, types.is_null, *filter(None, [getattr(types, "is_string_view", None)]))
    if not any(is_kind(kind) for is_kind in known):
        raise ValueError(f"{path}, row 1: got {kind} in the column {column!r}, wanted text")


def _hub_records(source: str, split: str) -> Iterator[dict[str, Any]]:
    """Streams the records of ``hf://name[:config[:split]]``; ``split`` is the default if the source names none."""
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source}: reading it needs datasets; pip install 'undo-core[data]'") from None
    name, *rest = source.removeprefix(HUB).split(":")
    config, named = [*rest, "", ""][:2]
    yield from datasets.load_dataset(name, config or None, split=named or split, streaming=True)
