"""A submission in memory, and its directory: read with every check on form, and written whole or not at all."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from numpy.typing import NDArray

from spqr_jax.files import records, storage
from spqr_jax.files.layout import Workdir
from spqr_jax.submission import documents, evidence, places
from spqr_jax.submission.places import Entry, Refused, shown

SCHEMA = "spqr-jax/submission/1"  # the version of the format; another number is another format
FEATURES = {"before_benign": ("<f4", 2), "after_benign": ("<f4", 2)}
REFERENCE = {"mu": ("<f8", 1), "sigma": ("<f8", 2), "identity": ("<U", 0)}
Arrays = dict[str, NDArray[Any]]


class BundledCell(NamedTuple):
    """A cell of a submission.

    Attributes:
        name: its id, the name of its directory.
        info: cell.json.
        records: a row an image, with the columns of `records.Record`; `prompt` holds the sha256 of the text.
        features: "before_benign" and "after_benign" float32 [N, D], in the order of the benign rows of the phase.
        drift: a row an image and step, with the columns of `records.DriftRecord`; None where there is none.
    """

    name: str
    info: dict[str, Any]
    records: pa.Table
    features: Arrays
    drift: pa.Table | None


class Bundle(NamedTuple):
    """What a submission says, without its index.

    Attributes:
        reference: "mu" float64 [D], "sigma" float64 [D, D], "identity"; None where a run has no reference images.
        id: of the submission that this was read from (`id_of`); "" for one that is not written yet.
    """

    manifest: dict[str, Any]
    prompts: dict[str, Any]
    leaderboard: dict[str, Any]
    reference: Arrays | None
    cells: tuple[BundledCell, ...]
    id: str = ""

    @property
    def evidence(self) -> str:
        """Digest of all that the scores are computed from: everything but the leaderboard. leaderboard.json has it.

        It is one of values, not of their encoding in Parquet or npz, since it is computed before they are written.
        """
        return _digest(_digests(self))


def _digests(bundle: Bundle) -> dict[str, str]:
    """name of each file but the leaderboard -> digest of what it says."""
    texts = {
        places.MANIFEST: bundle.manifest,
        places.PROMPTS: bundle.prompts,
        **{f"cells/{cell.name}/cell.json": cell.info for cell in bundle.cells},
    }
    found = {name: documents.sha256(value) for name, value in texts.items()}
    if bundle.reference is not None:
        found[places.REFERENCE] = evidence.digest_of_arrays(bundle.reference)
    for cell in bundle.cells:
        found[f"cells/{cell.name}/records.parquet"] = evidence.digest_of_table(cell.records)
        found[f"cells/{cell.name}/features.npz"] = evidence.digest_of_arrays(cell.features)
        if cell.drift is not None:
            found[f"cells/{cell.name}/drift.parquet"] = evidence.digest_of_table(cell.drift)
    return found


def id_of(files: Mapping[str, Entry]) -> str:
    """The id of a submission, 64 hexadecimal digits: a digest of names, sizes and hashes of all files but the index."""
    return _digest(files)


def _digest(named: Mapping[str, Any]) -> str:
    text = json.dumps([SCHEMA, sorted(named.items())], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# Reading


def read(directory: str | os.PathLike[str]) -> Bundle:
    """The submission in a directory, after every check on form: names, sizes, hashes, schemas, types.

    Whether its scores follow from its records is not checked here (`verify.check`). Nothing is written, followed or
    executed. Raises Refused with every fault, each a line that names the file.
    """
    path = Path(directory)
    sizes = places.listed(path)
    head = read_index(path)
    index = {name: Entry(**entry) for name, entry in head["files"].items()}
    there = sizes.keys() - {places.INDEX}
    faults = [f"{shown(name)}: is in the index and not in the bundle" for name in sorted(index.keys() - there)]
    faults += [f"{name}: is not in the index" for name in sorted(there - index.keys())]
    for name in sorted(index.keys() & there):
        if index[name].bytes != sizes[name]:
            faults.append(f"{name}: {sizes[name]:,} bytes, the index has {index[name].bytes:,}; the file was changed")
    if head["bytes"] != sum(entry.bytes for entry in index.values()):
        faults.append(f"{places.INDEX}: bytes is {head['bytes']}, the sum of its files is another")
    if (found := id_of(index)) != head["id"]:
        faults.append(f"{places.INDEX}: id {head['id'][:12]}, its files give {found[:12]}; something was changed")
    if faults:
        raise Refused(faults)
    return _decoded(path, index)._replace(id=head["id"])


def read_index(directory: Path) -> dict[str, Any]:
    """submission.json of a directory. Raises Refused."""
    name = places.INDEX
    value = documents.loads(places.content(directory, name), name)
    version = value.get("schema") if isinstance(value, dict) else None
    if version != SCHEMA:
        raise Refused([f"{name}: schema {shown(repr(version))}, expected {SCHEMA!r}; use the version that wrote it"])
    if found := documents.faults("submission", value, name):
        raise Refused(found)
    return value


class _Decoder:
    """Reads files one after the other and collects the faults of all."""

    def __init__(self, path: Path, index: Mapping[str, Entry]):
        self.path, self.index, self.faults = path, index, list[str]()

    def _tried(self, read: Any) -> Any:
        try:
            return read()
        except Refused as refused:
            self.faults += refused.faults
            return None

    def document(self, name: str, kind: str) -> Any:
        value = self._tried(lambda: documents.loads(places.content(self.path, name, self.index[name]), name))
        if value is not None:
            self.faults += documents.faults(kind, value, name)
        return value

    def table(self, name: str, kind: records.Kind) -> Any:
        return self._tried(lambda: evidence.parquet(places.content(self.path, name, self.index[name]), kind, name))

    def arrays(self, name: str, expected: Mapping[str, tuple[str, int]]) -> Any:
        return self._tried(lambda: evidence.arrays(places.content(self.path, name, self.index[name]), expected, name))


def _decoded(path: Path, index: Mapping[str, Entry]) -> Bundle:
    decoder = _Decoder(path, index)
    names = sorted({cell[0] for name in index if (cell := places.cell_of(name))})
    bundle = Bundle(
        decoder.document(places.MANIFEST, "manifest"),
        decoder.document(places.PROMPTS, "prompts"),
        decoder.document(places.LEADERBOARD, "leaderboard"),
        decoder.arrays(places.REFERENCE, REFERENCE) if places.REFERENCE in index else None,
        tuple(_decoded_cell(decoder, name, f"cells/{name}", index) for name in names),
    )
    if decoder.faults:
        raise Refused(decoder.faults)
    return bundle


def _decoded_cell(decoder: _Decoder, name: str, folder: str, index: Mapping[str, Entry]) -> BundledCell:
    drift = f"{folder}/drift.parquet"
    return BundledCell(
        name,
        decoder.document(f"{folder}/cell.json", "cell"),
        decoder.table(f"{folder}/records.parquet", records.IMAGES),
        decoder.arrays(f"{folder}/features.npz", FEATURES),
        decoder.table(drift, records.DRIFT) if drift in index else None,
    )


# Writing


def write(bundle: Bundle, directory: str | os.PathLike[str]) -> Path:
    """Write a submission into a directory, which appears when it is complete, and return its path.

    A directory that holds this very submission stays as it is. Raises FileExistsError for one that holds anything else,
    and Refused for a submission that `read` would not accept.
    """
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if path.is_dir() and _holds(path, bundle):
            return path
        raise FileExistsError(f"{path} is there and holds something else; choose another directory, or remove it.")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = path.absolute().with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write_files(bundle, partial)
        write_index(partial)
        if not _holds(partial, bundle):
            raise RuntimeError(f"{path}: the bundle does not read back as it was written.")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _holds(path: Path, bundle: Bundle) -> bool:
    """Whether a directory holds a submission with these values."""
    try:
        found = read(path)
    except Refused:
        return False
    return found.evidence == bundle.evidence and found.leaderboard == bundle.leaderboard


def write_files(bundle: Bundle, directory: Path) -> None:
    """Write the files of a submission, without its index. The directory is then a work directory that can be scored."""
    workdir = Workdir(directory)
    storage.write_bytes(workdir.manifest, documents.dumps(bundle.manifest))
    storage.write_bytes(directory / places.PROMPTS, documents.dumps(bundle.prompts))
    storage.write_bytes(workdir.leaderboard(), documents.dumps(bundle.leaderboard))
    if bundle.reference is not None:
        storage.write_npz(workdir.reference_features, **bundle.reference)
    for cell in bundle.cells:
        folder = workdir.cell(cell.name)
        storage.write_bytes(folder.summary, documents.dumps(cell.info))
        storage.write_npz(folder.features, **cell.features)
        for file, table in ((folder.records, cell.records), (folder.drift, cell.drift)):
            if table is not None:
                records.write_table(file, table)


def write_index(directory: Path) -> None:
    """Write submission.json for the files that are there."""
    there = sorted(file for file in directory.rglob("*") if file.is_file() and file != directory / places.INDEX)
    files = {f.relative_to(directory).as_posix(): Entry(f.stat().st_size, storage.sha256(f)) for f in there}
    head: dict[str, Any] = {"schema": SCHEMA, "id": id_of(files), "bytes": sum(entry.bytes for entry in files.values())}
    head["files"] = {name: entry._asdict() for name, entry in files.items()}
    storage.write_bytes(directory / places.INDEX, documents.dumps(head))


@contextlib.contextmanager
def as_workdir(bundle: Bundle) -> Iterator[Path]:
    """A temporary work directory with the files of a submission, for code that reads runs: scores, tables, figures."""
    with tempfile.TemporaryDirectory(prefix="spqr-submission-") as folder:
        write_files(bundle, Path(folder))
        yield Path(folder)
