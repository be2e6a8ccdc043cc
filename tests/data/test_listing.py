from pathlib import Path

import pytest

from vqscale.data.listing import Item, is_flat, list_folder, shuffled, split_items, unique_keys


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
    assert (listing.ignored, listing.unclassified) == (3, 1)
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
    ],
)
def test_wrong_labels_are_named_by_file_and_line(tmp_path: Path, lines: str, message: str) -> None:
    touch(tmp_path / "flat", "a.png", "b.png")
    (tmp_path / "labels.txt").write_text(lines)
    with pytest.raises(ValueError, match=message) as error:
        list_folder(str(tmp_path / "flat"), str(tmp_path / "labels.txt"), ("cat", "dog"))
    assert "labels.txt" in str(error.value)


def test_keys_are_unique_and_usable() -> None:
    paths = ["a.jpg", "a.png", "b.v2.jpg", "b_v2.jpg", "c.d/e.jpg", "__x__/f.jpg"]
    assert unique_keys(paths) == ["a", "a-png", "b_v2", "b_v2-jpg", "c.d/e", "x__/f"]


def items(count: int) -> list[Item]:
    return [Item(f"k{n:04d}", n % 3, f"k{n:04d}.png") for n in range(count)]


def test_holdout_by_fraction_is_decided_by_the_key() -> None:
    train, held = split_items(items(2000), "0.05")
    assert 60 < len(held) < 140 and len(train) + len(held) == 2000
    more_train, more_held = split_items(items(3000), "0.05")
    assert set(held) <= set(more_held) and set(train) <= set(more_train)
    assert len(split_items(items(2), "0.001")[1]) == 1 and split_items(items(5), "0")[1] == []


def test_holdout_every() -> None:
    held = split_items(items(45), "every:20")[1]
    assert [item.key for item in held] == ["k0000", "k0020", "k0040"]


@pytest.mark.parametrize("rule", ["1", "-0.1", "every:1", "every:x", "/no/such/folder"])
def test_holdout_rules_that_are_none(rule: str) -> None:
    with pytest.raises(ValueError, match=f"holdout={rule}"):
        split_items(items(3), rule)


def test_storage_order_mixes_and_depends_on_the_seed() -> None:
    order = shuffled(items(100), 1)
    assert order == shuffled(items(100)[::-1], 1) != shuffled(items(100), 2)
    assert order != items(100) and sorted(order, key=lambda item: item.key) == items(100)
