"""The Parquet and npz files of a bundle: decoded strictly, and digested by their values.

Both formats can promise more than they hold: a file of a few bytes may state a billion rows, or unpack without end.
Sizes that a file states are compared with limits and with each other before anything is decoded, and no pickle is read.
"""

import hashlib
import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spqr_jax.files.records import Kind
from spqr_jax.submission.places import Refused, shown

MOST_ROWS = 2_000_000  # of a Parquet file
MOST_UNPACKED = 1 << 30  # bytes of a Parquet file's values
LONGEST_TEXT = 65_536  # bytes of one value
CODECS = ("UNCOMPRESSED", "SNAPPY")
HEADER = 4096  # bytes of an array's description in an npz file, at most
FOOTER: dict[str, Any] = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 20}
NULLS = "holds an empty value (null)"


def parquet(data: bytes, kind: Kind, name: str) -> pa.Table:
    """The table of a Parquet file: the columns of its kind, in their order and types, each value present.

    Raises Refused naming the file, for any other file.
    """
    try:
        with pq.ParquetFile(pa.BufferReader(data), **FOOTER) as file:
            _check_promises(file, kind, name)
        texts = [field.name for field in kind.schema if pa.types.is_string(field.type)]
        # A text that is stored once is not unpacked a million times before its size is known.
        with pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts, **FOOTER) as file:
            table = file.read()
        table.validate(full=True)
        _check_texts(table, name)
        table = table.cast(kind.schema)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused([f"{name}: no Parquet that is accepted ({shown(str(error))})"]) from None
    nulls = [field for field in table.column_names if table.column(field).null_count]
    if nulls:
        raise Refused([f"{name}: column {nulls[0]} {NULLS}"])
    return table.combine_chunks()


def _check_promises(file: pq.ParquetFile, kind: Kind, name: str) -> None:
    """What the footer says about columns, rows, sizes and codecs."""
    found, wanted = file.schema_arrow, kind.schema
    if found.names != wanted.names:
        raise Refused([f"{name}: columns {shown(str(found.names))}, expected {wanted.names}"])
    for field in wanted:
        physical = found.field(field.name).type
        physical = physical.value_type if pa.types.is_dictionary(physical) else physical
        if physical != field.type:
            raise Refused([f"{name}: column {field.name} holds {physical}, expected {field.type}"])
    metadata = file.metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    if metadata.num_rows > MOST_ROWS or any(chunk.num_values > MOST_ROWS for chunk in chunks):
        raise Refused([f"{name}: more than {MOST_ROWS:,} rows"])
    if sum(chunk.total_uncompressed_size for chunk in chunks) > MOST_UNPACKED:
        raise Refused([f"{name}: unpacks to more than {MOST_UNPACKED:,} bytes"])
    if codecs := {chunk.compression for chunk in chunks} - set(CODECS):
        raise Refused([f"{name}: packed with {sorted(codecs)}, expected one of {CODECS}"])


def _check_texts(table: pa.Table, name: str) -> None:
    """The sizes of texts, before those that are stored once are unpacked."""
    unpacked = 0
    for column in table.columns:
        for chunk in column.chunks:
            if not pa.types.is_dictionary(chunk.type):
                continue
            longest = max((len(text.encode()) for text in chunk.dictionary.to_pylist() if text is not None), default=0)
            if longest > LONGEST_TEXT:
                raise Refused([f"{name}: a text of {longest:,} bytes, more than {LONGEST_TEXT:,}"])
            unpacked += longest * len(chunk)
    if unpacked > 4 * MOST_UNPACKED:
        raise Refused([f"{name}: its texts unpack to more than {4 * MOST_UNPACKED:,} bytes"])


def arrays(data: bytes, expected: Mapping[str, tuple[str, int]], name: str) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file as NumPy writes it, unpacked and without pickles.

    expected: name of each array -> its dtype, as NumPy writes it ("<f4"), and its number of axes. "<U" stands for a
    text of any length. Raises Refused naming the file, for any other file.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()) or set(members) != {f"{key}.npy" for key in expected}:
                raise Refused([f"{name}: arrays {shown(str(sorted(members)))}, expected {sorted(expected)}"])
            for info in members.values():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                    raise Refused([f"{name}: {shown(info.filename)} is packed; arrays lie in a bundle as they are"])
                if info.file_size > len(data):
                    raise Refused([f"{name}: {shown(info.filename)} states more bytes than the file has"])
            return {
                key: _array(archive.read(members[f"{key}.npy"]), dtype, axes, f"{name}: {key}")
                for key, (dtype, axes) in expected.items()
            }
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused([f"{name}: no npz file that is accepted ({shown(str(error))})"]) from None


def _array(data: bytes, dtype: str, axes: int, name: str) -> NDArray[Any]:
    """The array of an .npy file [its header states as many bytes as there are]."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise Refused([f"{name}: version {version} of the npy format, expected (1, 0)"])
    shape, fortran, found = np.lib.format.read_array_header_1_0(stream, max_header_size=HEADER)
    fits = found.kind == "U" if dtype == "<U" else found == np.dtype(dtype)
    if not fits or len(shape) != axes or fortran:
        raise Refused([f"{name}: {found} with {len(shape)} axes, expected {dtype} with {axes}"])
    start = stream.tell()
    if min(shape, default=1) < 0 or math.prod(shape) * found.itemsize != len(data) - start:
        raise Refused([f"{name}: shape {shape} does not fit its {len(data) - start:,} bytes"])
    array = np.frombuffer(data, found, offset=start).reshape(shape)
    if found.kind == "f" and not np.all(np.isfinite(array)):
        raise Refused([f"{name}: holds NaN or an infinity"])
    return array


def digest_of_table(table: pa.Table) -> str:
    """sha256 of the values of a table, column by column, whatever their encoding in a file."""
    total = hashlib.sha256()
    for field in table.schema:
        column = table.column(field.name)
        total.update(json.dumps([field.name, str(field.type), len(column)]).encode())
        if pa.types.is_string(field.type):
            for text in column.to_pylist():
                encoded = text.encode()
                total.update(struct.pack("<q", len(encoded)) + encoded)
        else:
            values = column.to_numpy()
            kind = "<f8" if pa.types.is_floating(field.type) else "<i8"
            values = np.where(np.isnan(values), np.nan, values) if kind == "<f8" else values  # one NaN of many
            total.update(np.ascontiguousarray(values, kind).tobytes())
    return total.hexdigest()


def digest_of_arrays(named: Mapping[str, NDArray[Any]]) -> str:
    """sha256 of names, types, shapes and values of arrays."""
    total = hashlib.sha256()
    for name in sorted(named):
        array = named[name]
        total.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
