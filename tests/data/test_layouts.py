"""Every layout that public data sets come in, built here in miniature, read into the same pairs."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spqr_jax import data
from spqr_jax.data import opening, parquet


def picture(value: int = 0, size=(6, 4), kind: str = "PNG") -> bytes:
    """An encoded image of one grey value."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(stream, kind)
    return stream.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_bytes(content)
    return path


def pairs(source) -> list[tuple[str, int]]:
    """(caption, grey value of the image) of every row."""
    values = [np.asarray(Image.open(io.BytesIO(source.read(i))))[0, 0, 0] for i in range(len(source))]
    return [(caption, int(value)) for caption, value in zip(source.captions, values, strict=True)]


def coco(folder, release="val2017", name="{:012d}.jpg", where="{release}"):
    """Three images of grey 9, 42, 7; several captions each, annotation ids out of order."""
    numbers = [9, 42, 7]
    images = [{"id": n, "file_name": name.format(n), "height": 4, "width": 6} for n in numbers]
    annotations = [
        {"id": 30 - 10 * k + n, "image_id": n, "caption": f"{text} of {n} "}
        for n in numbers
        for k, text in enumerate("cba")
    ]
    put(folder / "annotations" / f"captions_{release}.json", json.dumps({"images": images, "annotations": annotations}))
    for n in numbers:
        put(folder / where.format(release=release) / name.format(n), picture(n))
    return folder


@pytest.mark.parametrize(
    ("release", "name", "where"),
    [
        ("val2017", "{:012d}.jpg", "{release}"),
        ("train2014", "COCO_train2014_{:012d}.jpg", "{release}"),
        ("train2017", "{:012d}.jpg", "images/{release}"),
    ],
)
def test_coco(tmp_path, release, name, where):
    """One caption an image, the one with the lowest annotation id; folder and file are recognised alike."""
    folder = coco(tmp_path, release, name, where)
    expected = [("a of 7", 7), ("a of 9", 9), ("a of 42", 42)]
    for text in (folder, f"coco:{folder}", folder / "annotations" / f"captions_{release}.json"):
        source = data.open_source(str(text))
        assert pairs(source) == expected
    assert "lowest annotation id" in source.rule


def test_the_training_release_is_preferred(tmp_path):
    coco(coco(tmp_path, "val2017"), "train2014", "COCO_train2014_{:012d}.jpg")
    assert "train2014" in data.open_source(str(tmp_path)).name


LONG = "id,language,caption\n9,ar,قطة\n42,ar,كلب\n9,ar,second\n42,fr,un chien\n7,fr,\n"
WIDE = "image_id,en,fr,hi\n9,a cat,un chat,बिल्ली\n42,a dog,un chien,कुत्ता\n"


@pytest.mark.parametrize(
    ("name", "text", "language", "expected"),
    [
        ("long.csv", LONG, "ar", [("قطة", 9), ("كلب", 42)]),
        ("long.csv", LONG, "fr", [("un chien", 42), ("", 7)]),
        ("wide.csv", WIDE, "hi", [("बिल्ली", 9), ("कुत्ता", 42)]),
        ("one.tsv", "filename\tcaption\nCOCO_val2014_000000000042.jpg\tun perro\n", "", [("un perro", 42)]),
        ("rows.jsonl", '{"cocoid": 7, "caption": ["uno", "dos"]}\n', "", [("uno", 7)]),
    ],
)
def test_aligned_captions_over_coco_pictures(tmp_path, name, text, language, expected):
    folder = coco(tmp_path / "coco", "val2014", "COCO_val2014_{:012d}.jpg")
    table = put(tmp_path / name, text)
    source = data.open_source(f"multilingual:{table}?language={language}&images={folder}")
    assert pairs(source) == expected


def test_aligned_parquet(tmp_path):
    folder = coco(tmp_path / "coco")
    pq.write_table(pa.table({"id": [9, 7], "es": ["gato", "perro"]}), tmp_path / "es.parquet")
    assert pairs(data.open_source(f"{tmp_path / 'es.parquet'}?language=es&images={folder}")) == [
        ("gato", 9),
        ("perro", 7),
    ]


def hub_parquet(path, columns, groups=2, features=None):
    """A Parquet file as hubs write them: images as {bytes, path}, class names in the schema."""
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)


def cells(values):
    return [{"bytes": picture(v), "path": f"{v}.png"} for v in values]


def test_parquet_shards_with_pictures(tmp_path):
    """Rows are found across files and row groups; a list of captions counts by its first."""
    hub_parquet(tmp_path / "data" / "train-00000.parquet", {"image": cells([1, 2, 3]), "text": ["one", "two", "three"]})
    hub_parquet(tmp_path / "data" / "train-00001.parquet", {"image": cells([4]), "text": ["four"]})
    source = data.open_source(str(tmp_path))
    assert pairs(source) == [("one", 1), ("two", 2), ("three", 3), ("four", 4)]
    assert pairs(data.open_source(f"parquet:{tmp_path}/data/*-00001.parquet")) == [("four", 4)]


def test_parquet_in_one_language(tmp_path):
    columns = {"image": cells([1, 2]), "en": ["a", "b"], "ar": [["أ", "x"], ["ب", "y"]]}
    hub_parquet(tmp_path / "wide.parquet", columns)
    assert pairs(data.open_source(f"{tmp_path / 'wide.parquet'}?language=ar")) == [("أ", 1), ("ب", 2)]
    columns = {"image": [picture(1), picture(2)], "image_locale": ["hi", "fr"], "captions": [["एक"], ["deux"]]}
    hub_parquet(tmp_path / "long.parquet", columns)
    assert pairs(data.open_source(f"{tmp_path / 'long.parquet'}?language=fr")) == [("deux", 2)]


def test_parquet_with_style_labels(tmp_path):
    features = {"style": {"_type": "ClassLabel", "names": ["Ukiyo_e", "Pop_Art"]}, "image": {"_type": "Image"}}
    hub_parquet(tmp_path / "art.parquet", {"image": cells([1, 2]), "style": [1, 0]}, features=features)
    source = data.open_source(f"artistic:{tmp_path}?template={{label}}, a painting")
    assert pairs(source) == [("Pop Art, a painting", 1), ("Ukiyo e, a painting", 2)]
    assert parquet.class_names(parquet.open_file(tmp_path / "art.parquet").schema_arrow, "image") == []


def test_parquet_reads_a_row_group_once(tmp_path, monkeypatch):
    hub_parquet(tmp_path / "a.parquet", {"image": cells(range(8)), "text": list("abcdefgh")}, groups=4)
    source = data.open_source(str(tmp_path))
    opened = []
    whole = parquet.open_file
    monkeypatch.setattr(parquet, "open_file", lambda file: opened.append(file) or whole(file))
    source.prefetch([7, 0, 5, 2])
    assert [value for _, value in pairs(source)][0:8:2] == [0, 2, 4, 6]
    assert len(opened) == 2 + 4  # two groups for the four rows, then the rows that were not announced, one by one


@pytest.mark.parametrize("table", ["metadata.csv", "metadata.jsonl", "train/metadata.csv"])
def test_imagefolder(tmp_path, table):
    """Names are relative to the table's own folder."""
    text = "file_name,text\na/1.png,one\n2.png,two\n"
    if table.endswith("jsonl"):
        text = '{"file_name": "a/1.png", "text": "one"}\n{"file_name": "2.png", "text": "two"}\n'
    root = put(tmp_path / table, text).parent
    put(root / "a" / "1.png", picture(1))
    put(root / "2.png", picture(2))
    assert pairs(data.open_source(str(tmp_path))) == [("one", 1), ("two", 2)]


def test_text_files_beside_pictures(tmp_path):
    for n, text in ((1, "one\n"), (2, "two")):
        put(tmp_path / f"{n}.jpg", picture(n))
        put(tmp_path / f"{n}.txt", text)
    put(tmp_path / "3.jpg", picture(3))
    assert pairs(data.open_source(str(tmp_path))) == [("one", 1), ("two", 2)]


def test_classes(tmp_path):
    put(tmp_path / "Van_Gogh" / "a.jpg", picture(1))
    put(tmp_path / "deep" / "Chinese_Ink" / "b.JPG", picture(2))
    for text in (f"{tmp_path}", f"artistic:{tmp_path}"):
        captions = {"a picture in the style of Van Gogh", "a picture in the style of Chinese Ink"}
        assert set(data.open_source(text).captions) == captions
    assert pairs(data.open_source(f"classes:{tmp_path}?template=%7Blabel%7D")) == [("Van Gogh", 1), ("Chinese Ink", 2)]


def test_linked_folders_are_followed(tmp_path):
    put(tmp_path / "disk" / "Ghibli" / "a.jpg", picture(1))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "styles").symlink_to(tmp_path / "disk")
    assert pairs(data.open_source(f"artistic:{tmp_path / 'data'}")) == [("a picture in the style of Ghibli", 1)]


CHEST = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,"
    "Height],OriginalImagePixelSpacing[x,y],\n"
    "00000001_000.png,Cardiomegaly|Pleural_Thickening,0,1,58,M,PA,2682,2749,0.143,0.143,\n"
    "00000002_000.png,No Finding,0,2,81,F,AP,2500,2048,0.171,0.171,\n"
    "00000003_000.png,Hernia,0,3,81,F,PA,2500,2048,0.171,0.171,\n"
)


def test_chest_xray(tmp_path):
    """Only what is downloaded counts; captions say nothing of the patient, and of findings only if asked."""
    put(tmp_path / "Data_Entry_2017.csv", CHEST)
    put(tmp_path / "test_list.txt", "00000002_000.png\n")
    put(tmp_path / "images_001" / "images" / "00000001_000.png", picture(1))
    put(tmp_path / "images_002" / "images" / "00000002_000.png", picture(2))
    views = ["a frontal chest X-ray, posteroanterior view", "a frontal chest X-ray, anteroposterior view"]
    assert pairs(data.open_source(str(tmp_path))) == list(zip(views, (1, 2), strict=True))
    said = data.open_source(f"chestxray:{tmp_path}?template=%7Bfindings%7D").captions
    assert said == ("cardiomegaly and pleural thickening", "no finding")
    assert pairs(data.open_source(f"chestxray:{tmp_path}?split=test")) == [(views[1], 2)]


def test_brain_mri(tmp_path):
    for i, name in enumerate(("Training/Glioma_tumor", "Training/no_tumor", "Testing/pituitary")):
        put(tmp_path / name / f"{i}.jpg", picture(i))
    source = data.open_source(str(tmp_path))
    assert set(source.captions) == {"a magnetic resonance scan of a brain"} and len(source) == 3
    labels = data.open_source(f"brainmri:{tmp_path}?template=%7Blabel%7D").captions
    assert set(labels) == {"glioma tumor", "no tumor", "pituitary"}


def tar_file(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_webdataset(tmp_path):
    """Text or JSON captions; members that are no sample, and links, are left alone."""
    members = {
        "s/0001.png": picture(1),
        "s/0001.txt": b"eins",
        "s/0001.seg.png": picture(9),
        "0002.json": json.dumps({"caption": "zwei", "width": 6}).encode(),
        "0002.jpg": picture(2),
        "0003.jpg": picture(3),
        "../../../etc/0004.txt": b"out",
    }
    file = tar_file(tmp_path / "0.tar", members)
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("0003.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    tar_file(tmp_path / "1.tar", {"a.png": picture(5), "a.caption": b"drei"})
    assert pairs(data.open_source(str(tmp_path))) == [("eins", 1), ("zwei", 2), ("drei", 5)]
    assert len(data.open_source(f"webdataset:{tmp_path}/1*.tar")) == 1


def test_a_mixture_takes_from_its_parts_in_turn(tmp_path):
    """50 of one, 5 of the other: the first ten drawn are half and half."""
    for i in range(50):
        put(tmp_path / "a" / "one" / f"{i}.png", picture(1))
    for i in range(5):
        put(tmp_path / "b" / "two" / f"{i}.png", picture(2))
    text = " + ".join(f"classes:{tmp_path / name}?template=%7Blabel%7D" for name in "ab")
    drawn = data.load(text, 55, side=4)
    assert sorted(drawn.captions[:10]) == ["one"] * 5 + ["two"] * 5
    assert [int(drawn.images(np.array([i]))[0, 0, 0, 0]) for i in range(4)] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("files", "text", "says"),
    [
        ({}, "{}/nowhere", "nowhere does not exist"),
        ({}, "cocoa:{}", "cocoa: is unknown; expected one of coco"),
        ({"a.png": picture()}, "{}", "no layout recognised"),
        ({"a.png": picture()}, "classes:{}?colour=red", "option 'colour' is unknown; classes knows template"),
        ({"a.png": picture()}, "classes:{}", "no folders of images"),
        ({"x/a.png": picture()}, "classes:{}?template=%7Bcolour%7D", "may hold {label}"),
        ({"a.png": picture()}, "folder:{}", "no metadata.jsonl"),
        ({}, "coco:{}", "no annotations/captions_"),
        ({"captions_val2017.json": "{}"}, "{}", "no list 'images'"),
        ({"captions_val2017.json": '{"images": ['}, "{}", "captions_val2017.json is not JSON"),
        ({"metadata.csv": "file_name,text\n"}, "{}", "metadata.csv holds no rows"),
        ({"metadata.csv": "file_name,words\na.png,x\n"}, "{}", "no caption column.*found file_name, words"),
        ({"metadata.csv": "file_name,text\n../a.png,x\n"}, "{}", "metadata.csv, row 0.*leads out of"),
        ({"metadata.csv": "file_name,text\n/etc/a.png,x\n"}, "{}", "leads out of"),
        (
            {"metadata.csv": "file_name,text\na.png,né\n".encode("latin-1")},
            "{}",
            r"metadata.csv is not UTF-8 \(.* at byte",
        ),
        ({"metadata.jsonl": '{"file_name": "a"}\nx'}, "{}", "metadata.jsonl, line 2 is not JSON"),
        ({"a.txt": b"\xff", "a.png": picture()}, "{}", "a.txt is not UTF-8"),
        ({"a.parquet": b"PAR1 no"}, "{}", "a.parquet is not a readable Parquet file"),
        ({"a.tar": b"\x1f\x8b" * 600}, "{}", "a.tar is not a readable tar file"),
        ({"a.csv": LONG}, "{}/a.csv?language=hi", "language=hi is not one of its languages"),
        ({"a.csv": LONG}, "{}/a.csv", r"not one of its languages \(ar, fr\)"),
        ({"a.csv": LONG}, "{}/a.csv?language=ar&images=nowhere", "folder of images 'nowhere' does not exist"),
        ({"Data_Entry_2017.csv": CHEST}, "{}?split=odd", "split=odd is unknown"),
        ({"Data_Entry_2017.csv": CHEST}, "{}", "holds no captioned image"),
    ],
)
def test_bad_data_sets_are_named(tmp_path, files, text, says):
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        data.open_source(text.format(tmp_path))


def test_parquet_and_tar_name_the_member_at_fault(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column of images; it has a"):
        data.open_source(f"parquet:{tmp_path}")
    file = tar_file(tmp_path / "a.tar", {"x.png": picture(), "x.txt": b"caf\xe9"})
    with pytest.raises(ValueError, match=r"a.tar:x.txt is not UTF-8"):
        data.open_source(str(file))


def test_every_kind_is_documented():
    assert all(opening.KINDS[kind].__doc__ for kind in opening.KINDS)
