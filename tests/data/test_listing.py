import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from vqscale.data.listing import Item, Listing, is_flat, list_folder, shuffled, unique_keys


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_first_subfolders_are_the_classes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/b.JPG", "cat/deep/er/a.png", "ant/c.jpeg", "ant/notes.txt", "empty/readme.md", ".git/x.png")
    touch(tmp_path, "cat/.hidden.jpg", "loose.png", "Makefile")
    listing = list_folder(str(tmp_path))
    assert listing.classes == ("ant", "cat")
    assert [(i.key, i.label, i.path) for i in listing.items] == [
        ("ant/c", 0, "ant/c.jpeg"),
        ("cat/b", 1, "cat/b.JPG"),
        ("cat/deep/er/a", 1, "cat/deep/er/a.png"),
    ]
    assert (listing.ignored.total(), listing.unclassified) == (3, 1)
    assert not is_flat(str(tmp_path))


def test_a_flat_folder_is_one_class(tmp_path: Path) -> None:
    touch(tmp_path, "b.png", "a.png")
    listing = list_folder(str(tmp_path))
    assert listing.classes == ("all",) and [i.key for i in listing.items] == ["a", "b"] and is_flat(str(tmp_path))


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert [i.path for i in list_folder(str(tmp_path)).items] == ["cat/a.png"]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        list_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no images \(0 other files\)"):
        list_folder(str(tmp_path))
    touch(tmp_path, "a/x.txt", "y.mp4")
    with pytest.raises(ValueError, match=r"holds no images \(2 other files\)"):
        list_folder(str(tmp_path))


def test_known_classes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.png", "dog/b.png")
    assert [i.label for i in list_folder(str(tmp_path), classes=["ant", "dog", "cat"]).items] == [2, 1]
    with pytest.raises(ValueError, match="'dog' is not one of the 2 known classes"):
        list_folder(str(tmp_path), classes=["ant", "cat"])


@pytest.mark.parametrize(
    ("lines", "classes", "expected"),
    [
        ("a.png cat\nb c.png dog\n\n", (), (("cat", "dog"), [0, 1])),
        ("./a.png\tbig cat\nb c.png\tdog", (), (("big cat", "dog"), [0, 1])),
        ("a.png 2\nb c.png 0", (), (("0", "1", "2"), [2, 0])),
        ("\ufeffa.png cat\r\nb c.png dog\r\n", (), (("cat", "dog"), [0, 1])),
        ("a.png 2\nb c.png 1", ("1", "2", "3"), (("1", "2", "3"), [1, 0])),
        ("a.png 2\nb c.png 0", ("a", "b", "c"), (("a", "b", "c"), [2, 0])),
        ("a.png 1\nb c.png dog", ("cat", "dog"), (("cat", "dog"), [1, 1])),
    ],
)
def test_labels_file(tmp_path: Path, lines: str, classes: tuple[str, ...], expected: object) -> None:
    touch(tmp_path / "flat", "a.png", "b c.png")
    (tmp_path / "labels.txt").write_text(lines)
    listing = list_folder(str(tmp_path / "flat"), str(tmp_path / "labels.txt"), classes)
    assert (listing.classes, [i.label for i in listing.items]) == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png cat\nb.png\n", "line 2: expected `filename class`, found 'b.png'"),
        ("a.png cat\nc.png cat", "line 2: there is no image 'c.png'"),
        ("a.png cat\nb.png dog\na.png dog", "line 3: 'a.png' has another class in line 1"),
        ("a.png cat", "no class for 'b.png'"),
        ("a.png cat\nb.png cow", "line 2: 'cow' is not one of the 2 classes"),
        ("a.png -1\nb.png cat", "line 1: '-1' is not one"),
        ("a.png cat\nb.png 2", "line 2: '2' is not one"),
        ("a.png cat\nb.png ²", "line 2: '²' is not one"),
        ("a.png 1" + "0" * 5000 + "\nb.png cat", "line 1: '10*' is not one"),
    ],
)
def test_wrong_labels_are_named_by_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    touch(tmp_path / "flat", "a.png", "b.png")
    (tmp_path / "labels.txt").write_text(lines)
    with pytest.raises(ValueError, match=message) as error:
        list_folder(str(tmp_path / "flat"), str(tmp_path / "labels.txt"), ("cat", "dog"))
    assert "labels.txt" in str(error.value)


@pytest.mark.parametrize(
    ("content", "classes", "message"),
    [
        (b"a.png caf\xe9\nb.png x", (), "labels.txt, line 1: not UTF-8"),
        (b"a.png x\nb.png \xff\xfe", (), "labels.txt, line 2: not UTF-8"),
        (b"a.png 0\nb.png 1234567890123", (), "line 2: 1234567890123 is too large for a class number"),
        (b"a.png 0\nb.png 100000", (), "line 2: 100000 is too large for a class number"),
        (
            b"a.png 1\nb.png 0",
            ("1", "2", "3"),
            "line 1: '1' is the name of class number 0, but '0' in line 2 is no name",
        ),
        (b"a.png x\x1b[31m\nb.png y", (), r"the class name 'x\\x1b\[31m' has invisible characters"),
    ],
)
def test_labels_that_can_be_read_in_two_ways_or_in_none(
    tmp_path: Path, content: bytes, classes: tuple[str, ...], message: str
) -> None:
    touch(tmp_path / "flat", "a.png", "b.png")
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list_folder(str(tmp_path / "flat"), str(tmp_path / "labels.txt"), classes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"caf\xe9", r"the class name b'caf\\xe9' is not UTF-8; rename it"),
        (b"two\nlines", r"the class name 'two\\nlines' has invisible characters; rename it"),
        (b"red\x1b[31m", r"'red\\x1b\[31m' has invisible"),
        ("right\u202eleft".encode(), r"'right\\u202eleft' has invisible"),
        (b" ", "' ' has invisible"),
    ],
)
def test_unusable_class_names(tmp_path: Path, name: bytes, message: str) -> None:
    touch(tmp_path, os.fsdecode(name) + "/a.png", "good/b.png")
    with pytest.raises(ValueError, match=message):
        list_folder(str(tmp_path))


def test_names_in_any_script_are_classes(tmp_path: Path) -> None:
    names = ["café", "猫", "кошка", "\N{CAT FACE}", "a b", "x" * 200]
    touch(tmp_path, *(f"{name}/a.png" for name in names))
    assert set(list_folder(str(tmp_path)).classes) == set(names)


def test_file_names_that_are_no_text_become_keys_that_are(tmp_path: Path) -> None:
    touch(tmp_path, "a/" + os.fsdecode(b"caf\xe9") + ".png", "a/two\nlines.png", "a/\x1b[31m.png")
    assert [item.key for item in list_folder(str(tmp_path)).items] == ["a/\\x1b[31m", "a/caf\\xe9", "a/two\\nlines"]


def test_suffixes_in_any_case_and_less_known_ones(tmp_path: Path) -> None:
    names = ["a.JPG", "b.jfif", "c.Jpe", "d.PNG", "e.Tif", "f.webp", "g.avif", "h.pbm"]
    touch(tmp_path, *names)
    assert len(list_folder(str(tmp_path)).items) == len(names)


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "cat/a.png", "cat/notes.TXT", "dog/a.heic", "dog/b.heic", "dog/c", "empty/.hidden.png")
    (tmp_path / "links").mkdir()
    for n in range(3):
        (tmp_path / "links" / f"{n}.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "round").symlink_to(tmp_path / "cat" / "round")
    listing = list_folder(str(tmp_path))
    assert listing.classes == ("cat",) and listing.ignored == {".heic": 2, ".txt": 1, "without a suffix": 1}
    assert listing.warnings == (
        "4 links lead nowhere, e.g. cat/round",
        "3 folders hold no image and became no class: dog (2 .heic, 1 without a suffix), empty (empty), "
        "links (3 links that lead nowhere)",
    )
    (tmp_path / "cat" / "a.png").unlink()
    with pytest.raises(
        ValueError, match=r"no images \(8 other files\): 4 links that lead nowhere, 2 .heic, 1 .txt, 1 "
    ):
        list_folder(str(tmp_path))


def test_a_root_of_splits_gives_a_hint(tmp_path: Path) -> None:
    touch(tmp_path, "Train/cat/a.png", "val/cat/b.png")
    (hint,) = list_folder(str(tmp_path)).warnings
    assert "Train, val became the classes" in hint and f"source={tmp_path}/Train holdout={tmp_path}/val" in hint
    touch(tmp_path, "cat/c.png")
    assert list_folder(str(tmp_path)).warnings == ()


def split(items: Sequence[Item], rule: str) -> tuple[list[Item], list[Item]]:
    splits = Listing("", tuple(items), ()).split(rule)
    return list(splits["train"].items), list(splits["holdout"].items)


def test_links_to_one_file_are_held_out_together(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{n:02d}.png" for n in range(40)))
    for n in range(40):
        (tmp_path / "a" / f"link{n:02d}.png").symlink_to(tmp_path / "a" / f"{n:02d}.png")
    items = list_folder(str(tmp_path)).items
    for rule in ("0.2", "every:10"):
        train, held = split(items, rule)
        assert len(train) + len(held) == 80 and len(held) >= 8
        assert not {item.identity for item in train} & {item.identity for item in held}


def test_keys_are_unique_and_usable() -> None:
    paths = ["a.jpg", "a.png", "b.v2.jpg", "b_v2.jpg", "c.d/e.jpg", "__x__/f.jpg"]
    assert unique_keys(paths) == ["a", "a-png", "b_v2", "b_v2-jpg", "c.d/e", "x__/f"]


def items(count: int) -> list[Item]:
    return [Item(f"k{n:04d}", n % 3, f"k{n:04d}.png") for n in range(count)]


def test_holdout_by_fraction_is_decided_by_the_key() -> None:
    train, held = split(items(2000), "0.05")
    assert 60 < len(held) < 140 and len(train) + len(held) == 2000
    more_train, more_held = split(items(3000), "0.05")
    assert set(held) <= set(more_held) and set(train) <= set(more_train)
    assert len(split(items(2), "0.001")[1]) == 1 and split(items(5), "0")[1] == []


def test_holdout_every() -> None:
    held = split(items(45), "every:20")[1]
    assert [item.key for item in held] == ["k0000", "k0020", "k0040"]


@pytest.mark.parametrize("rule", ["1", "-0.1", "every:1", "every:x", "/no/such/folder"])
def test_holdout_rules_that_are_none(rule: str) -> None:
    with pytest.raises(ValueError, match=f"holdout={rule}"):
        split(items(3), rule)


def test_storage_order_mixes_and_depends_on_the_seed() -> None:
    order = shuffled(items(100), 1)
    assert order == shuffled(items(100)[::-1], 1) != shuffled(items(100), 2)
    assert order != items(100) and sorted(order, key=lambda item: item.key) == items(100)
