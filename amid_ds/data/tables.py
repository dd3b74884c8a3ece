"""The rows of Parquet and Arrow files, checked before they are trusted.

pyarrow maps an Arrow file and believes what it says, and a wrong offset leads outside the memory
of the process. So every column of every batch is validated before a value is taken out of it.
Two kinds of damage are told apart: text that is not UTF-8 is one bad row, anything else a bad
file, for then no row of it can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from amid_ds.errors import InputError

TABLE_BATCH_ROWS = 1000
# Past the last row of any file.
ALL_ROWS = 1 << 62

# (the values of the fields, or nothing; the problem that keeps the row from being read, or None)
TableRow = tuple[tuple[Any, ...], str | None]


def parquet_metadata(path: str) -> pa.parquet.FileMetaData:
    """The sizes of a file's row groups. Raises InputError if it cannot be read or has none."""
    metadata = _open_parquet(path).metadata
    if metadata.num_row_groups == 0:
        raise InputError(f"the data file {path!r} is empty: it has no row group",
                         "at least one row", "remove the file or fill it")
    return metadata


def parquet_rows(path: str, groups: Sequence[int], fields: Sequence[str],
                 optional: Sequence[str]) -> Iterator[TableRow]:
    """The rows of some row groups; None for the values of `optional` fields that it lacks.

    Raises InputError for a damaged file, or without a column.
    """
    file = _open_parquet(path)
    present = _present_columns(path, _names(path, file.schema_arrow), fields, optional)
    return _checked_rows(path, file.iter_batches(TABLE_BATCH_ROWS, row_groups=groups,
                                                 columns=present), fields)


def arrow_rows(path: str, first: int, stop: int, fields: Sequence[str],
               optional: Sequence[str]) -> Iterator[TableRow]:
    """The rows [first, stop) of a file in either format, the stream that `datasets` writes or the
    file; None for the values of `optional` fields that it lacks.

    Raises InputError for a damaged file, or without a column.
    """
    _present_columns(path, table_columns(path, is_parquet=False), fields, optional)
    return _checked_rows(path, _arrow_batches(path, first, stop), fields)


def count_arrow_rows(path: str) -> int:
    """The rows of an Arrow file, from the heads of its batches."""
    return sum(batch.num_rows for batch in _damage_named(path, _arrow_batches(path, 0, ALL_ROWS)))


def table_columns(path: str, is_parquet: bool) -> list[str]:
    """The names of a table's columns. Raises InputError for a damaged file."""
    if is_parquet:
        return _names(path, _open_parquet(path).schema_arrow)
    with pa.memory_map(path) as source:
        return _names(path, _open_arrow(path, source)[0])


def _names(path: str, schema: pa.Schema) -> list[str]:
    try:
        return list(schema.names)
    except UnicodeDecodeError as error:
        raise damaged_file(path, f"the name of a column is no UTF-8 ({error})") from None


def _present_columns(path: str, names: Sequence[str], fields: Sequence[str],
                     optional: Sequence[str]) -> list[str]:
    """Those of the fields that a table has. Raises InputError unless it has each once."""
    problem = missing_field(names, [field for field in fields if field not in optional])
    if twice := [field for field in fields if names.count(field) > 1]:
        problem = f"has the column {twice[0]!r} {names.count(twice[0])} times"
    if problem:
        raise InputError(f"the table {path} {problem}", f"once each the columns "
                         f"{', '.join(fields)}",
                         "name the rows' columns: `text`, or `prompt` and `response`, or "
                         "`messages`, in the recipe or by the options of these names")
    return [field for field in fields if field in names]


def missing_field(names: Iterable[str], fields: Sequence[str]) -> str | None:
    """What a row or table without one of the fields is told, or None if it has all."""
    missing = [field for field in fields if field not in names]
    if not missing:
        return None
    return f"lacks the field {missing[0]!r}; it has {', '.join(map(repr, names)) or 'none'}"


def damaged_file(path: str, error: object) -> InputError:
    """The error for a file that is not what its name says, or no longer."""
    return InputError(f"the data file {path} cannot be read: {error}",
                      f"a whole {Path(path).suffix.lstrip('.')} file, as it was written",
                      "write or copy it again")


def _open_parquet(path: str) -> pa.parquet.ParquetFile:
    try:
        return pa.parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except Exception as error:
        # Damaged bytes end pyarrow's readers with anything, a SystemError among them.
        raise damaged_file(path, error) from None


def _open_arrow(path: str, source: pa.MemoryMappedFile) -> tuple[pa.Schema, Iterable[Any]]:
    try:
        stream = pa.ipc.open_stream(source)
        return stream.schema, stream
    except Exception:
        pass
    try:
        file = pa.ipc.open_file(source)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    except Exception as error:
        raise damaged_file(path, error) from None


def _arrow_batches(path: str, first: int, stop: int) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as source:
        begin = 0
        for batch in _open_arrow(path, source)[1]:
            end = begin + batch.num_rows
            if begin >= stop:
                return
            if end > first:
                yield batch.slice(max(first - begin, 0), min(stop, end) - max(first, begin))
            begin = end


def _checked_rows(path: str, batches: Iterable[pa.RecordBatch],
                  fields: Sequence[str]) -> Iterator[TableRow]:
    for batch in _damage_named(path, batches):
        names = _names(path, batch.schema)
        columns = [_checked_column(path, batch, field) if field in names else
                   pa.nulls(batch.num_rows) for field in fields]
        for start in range(0, batch.num_rows, TABLE_BATCH_ROWS):
            values = [_values(column.slice(start, TABLE_BATCH_ROWS)) for column in columns]
            for row in zip(*values, strict=True):
                error = next((value for value in row if isinstance(value, Exception)), None)
                yield (row, None) if error is None else ((), f"cannot be read: {error}")


def _damage_named(path: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches; a damaged one raises InputError with the file's name."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator, None)
        except InputError:
            raise
        except Exception as error:
            raise damaged_file(path, error) from None
        if batch is None:
            return
        yield batch


def _checked_column(path: str, batch: pa.RecordBatch, field: str) -> pa.Array:
    """A column whose values can be taken out safely, though some may be no UTF-8."""
    try:
        column = batch.column(field)
        if len(column) != batch.num_rows:
            raise ValueError(f"its column {field!r} has not as many rows as the others")
        try:
            column.validate(full=True)
        except pa.ArrowInvalid:
            column.view(_as_bytes(column.type)).validate(full=True)
    except Exception as error:
        raise damaged_file(path, error) from None
    return column


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes where it has text: of the same layout, and valid with any bytes."""
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([child.with_type(_as_bytes(child.type)) for child in kind.fields])
    return kind


def _values(column: pa.Array) -> list[Any]:
    """The values of a valid column; in place of one that is no UTF-8, its error."""
    try:
        return list(column.to_pylist())
    except Exception:
        return [_value(cell) for cell in column]


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except Exception as error:
        # As bytes that are no UTF-8, or a date that Python does not have.
        return error
