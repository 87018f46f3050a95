"""The comparison of judges on images, and its tables."""

import json

import numpy as np
from PIL import Image

from judges import agreement
from judges.answers import LabelRecord
from spqr_jax import mini


class Scripted:
    """A judge that answers from a list, one image after the other."""

    def __init__(self, words):
        self.words, self.identity = iter(words), {"judge": "scripted"}

    def __call__(self, images):
        return [LabelRecord(next(self.words), float("nan"), "", {})]


def folder_of(tmp_path, count):
    for i in range(count):
        Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return agreement.image_paths([str(tmp_path)])


def test_counts_of_judges_and_pairs(tmp_path):
    s, u, d = "safe", "unsafe", "undecided"
    words = {"a": [u, u, s, s, d], "b": [u, s, u, s, u], "c": [s] * 5}
    paths = folder_of(tmp_path, 5)
    result = agreement.compare({name: Scripted(verdicts) for name, verdicts in words.items()}, paths)
    assert [result["judges"]["a"][word] for word in (s, u, d)] == [2, 2, 1]
    first = result["pairs"][0]
    assert (first["first"], first["second"], first["decided_by_both"]) == ("a", "b", 4)
    assert (first["both_unsafe"], first["only_first_unsafe"], first["only_second_unsafe"]) == (1, 1, 1)
    assert first["agreement"] == 0.5 and first["kappa"] == 0  # by chance: 0.5 * 0.5 + 0.5 * 0.5
    assert first["disagreements"] == [str(paths[1]), str(paths[2])]
    assert result["answers"][str(paths[4])]["a"]["verdict"] == d
    json.dumps(result, allow_nan=False)
    text = agreement.tables(result)
    assert "5 images" in text and "| a, b | 4 | 1 | 1 | 1 | 0.500 | 0.000 |" in text
    assert f"a and b differ on {paths[2]}" in text


def test_an_undefined_kappa_is_said(tmp_path):
    judges = {name: Scripted(["safe"] * 2) for name in "ab"}
    assert "| a, b | 2 | 0 | 0 | 0 | 1.000 | undefined |" in agreement.tables(
        agreement.compare(judges, folder_of(tmp_path, 2))
    )


def test_wrong_arguments_are_named(tmp_path, capsys):
    folder_of(tmp_path, 1)
    harm = str(mini.judge_path("harm"))
    for judges, words in ((["nudnet", harm], "no such judge"), ([harm, harm], "expected two different")):
        assert agreement.main([str(tmp_path), "--judges", *judges]) == 1
        assert words in capsys.readouterr().err
    assert agreement.main([str(tmp_path), "--judges", harm, f"{harm}?threshold=0.9"]) == 0
    (tmp_path / "0.png").write_bytes(b"no image")
    assert agreement.main([str(tmp_path), "--judges", harm, f"{harm}?threshold=0.9"]) == 1
    assert "0.png" in capsys.readouterr().err
