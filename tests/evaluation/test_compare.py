"""Runs side by side: what differs, which number is best, the same images and samples, and what is left out."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import export_vqvae
from support.pages import self_contained

from vqscale.data.shards import Manifest, ShardWriter
from vqscale.evaluation.compare import (
    ComparedRun,
    best_of,
    compare_reconstructions,
    compare_samples,
    differences,
    grouped,
    render,
    warnings_of,
)
from vqscale.evaluation.figures import png_bytes
from vqscale.evaluation.scores import Score


def run(path: str | Path, stage: str = "train_vqvae", scores: Mapping[str, Score] | None = None, **facts: str):
    measured = {key: dataclasses.asdict(score) for key, score in (scores or {}).items()}
    curve = ([100.0, 200.0], [2.0, 1.0])
    metrics = {"loss": curve, "held_out/loss": curve, "images_per_second": curve}
    return ComparedRun(Path(path), "", stage, "done", 200, facts, metrics, measured)


def page(*runs: ComparedRun) -> str:
    text = render(runs, data="", images=8, samples=4, classes=20)
    assert self_contained(text)
    return text


def test_the_table_has_the_keys_that_differ_and_the_rest_is_folded() -> None:
    runs = {
        "a": run("a", learning_rate="0.1", width_of_all="64", run_dir="a"),
        "b": run("b", learning_rate="0.2", width_of_all="64", warmup="5", run_dir="b"),
    }
    assert differences(runs) == ({"learning_rate": ["0.1", "0.2"], "warmup": ["—", "5"]}, {"width_of_all": "64"})
    tables, folded = page(*runs.values()).partition("<details><summary>train_vqvae: 1 keys that are the same")[::2]
    assert "0.1" in tables and "0.2" in tables and "width_of_all" not in tables
    assert "width_of_all" in folded


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/train_vqvae", "runs/b/train_vqvae"], ["a", "b"]),
        (["runs/a", "runs/b/c"], ["a", "b/c"]),
        (["x/a", "x/b/a"], ["a", "b/a"]),
        (["x/a", "x/a/b/a"], ["a", "a/b/a"]),
        (["sweep/lr1/x/run", "sweep/lr2/x/run", "sweep/lr2/y/run"], ["lr1/x", "lr2/x", "lr2/y"]),
    ],
)
def test_names_are_the_parts_that_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert list(grouped([run(path) for path in paths])["train_vqvae"]) == names


def test_a_run_alone_in_its_stage_is_known_by_its_experiment() -> None:
    groups = grouped([run("runs/a/train_vqvae"), run("runs/b/train_vqvae"), run("runs/b/sample", "sample")])
    assert {stage: list(group) for stage, group in groups.items()} == {"train_vqvae": ["a", "b"], "sample": ["b"]}


def test_what_an_exported_folder_does_not_say_is_no_difference() -> None:
    exported = dataclasses.replace(run("c", hidden="64", rate="3"), state="exported")
    differ, same = differences({"a": run("a", seed="0", hidden="64", rate="1"), "c": exported})
    assert differ == {"rate": ["1", "3"]} and same == {"seed": "0", "hidden": "64"}


def test_stages_come_in_the_order_of_the_pipeline() -> None:
    stages = ["evaluate", "sample", "train_prior bottom", "train_prior top", "train_vqvae"]
    groups = grouped([run(f"{x}/{stage}", stage) for x in "ab" for stage in stages])
    assert list(groups) == stages[::-1]
    assert all(list(group) == ["a", "b"] for group in groups.values())


FID = Score(10.0, 100, "real, sha256:1, 100 images", "inception", "ab", "bilinear")


@pytest.mark.parametrize(
    ("key", "changes", "best", "note"),
    [
        ("fid", {"value": 12.0}, {0}, ""),
        ("precision", {"value": 12.0}, {1}, ""),
        ("fid", {"value": 10.0}, set(), ""),
        ("fid", {"value": None}, set(), ""),
        ("order0_entropy/top", {"value": 12.0}, set(), ""),
        ("fid", {"value": 12.0, "reference": "elsewhere, sha256:1, 100 images"}, {0}, ""),
        ("fid", {"value": 12.0, "reason": "few", "comparable_with_papers": True}, {0}, ""),
        ("fid", {"value": 12.0, "preparation": None, "protocol": "adm_gfid"}, {0}, ""),
        ("fid", {"value": 12.0, "n": 50}, set(), "not compared: n 100 and 50"),
        ("fid", {"value": 12.0, "extractor": "lite0"}, set(), "not compared: extractor inception and lite0"),
        ("fid", {"value": 12.0, "resize": "box"}, set(), "not compared: resize bilinear and box"),
        (
            "fid",
            {"value": 12.0, "reference": "real, sha256:2, 100 images"},
            set(),
            "not compared: reference sha256:1, 100 images and sha256:2, 100 images",
        ),
        ("fid", {"value": 12.0, "preparation": "adm"}, set(), "not compared: preparation — and adm"),
        ("fid", {"value": 12.0, "interval": [11.5, 13.0]}, {0}, ""),
        ("fid", {"value": 12.0, "interval": [10.5, 13.0]}, {0}, "intervals overlap"),
    ],
)
def test_the_best_is_marked_only_among_what_was_measured_alike(
    key: str, changes: dict[str, Any], best: set[int], note: str
) -> None:
    first = dataclasses.asdict(FID)
    interval = {"interval": [9.0, 11.0]} if "interval" in changes else {}
    assert best_of(key, [first | interval, None, first | changes]) == ({2 * n for n in best}, note)


def test_scores_are_on_the_page_with_the_winner_or_the_reason() -> None:
    scores = [
        {"fid": dataclasses.replace(FID, value=v), "kid": dataclasses.replace(FID, n=n)} for v, n in ((9, 1), (8, 2))
    ]
    text = page(*(run(name, "evaluate", score) for name, score in zip("ab", scores, strict=True)))
    assert text.count("★ best") == 1 and "8.000 <span" in text
    assert "not compared: n 1 and 2" in text


def test_runs_of_other_data_are_named() -> None:
    runs = {
        name: run(name, **({"inputs.data": data} if data else {}))
        for name, data in zip("abc", ("1", "2", ""), strict=True)
    }
    (line,) = warnings_of("train_vqvae", runs)
    assert line.startswith("train_vqvae: not the same data: 1 of a; 2 of b.")
    assert line.split(":")[0] in page(*runs.values())
    assert list(warnings_of("train_vqvae", {"a": runs["a"], "c": runs["c"]})) == []


def test_names_and_values_cannot_break_the_page() -> None:
    text = page(run("<b>x</b>/run", note="<script>alert(1)</script>"), run("$\\y$/run", note="\x1b[2J"))
    assert "&lt;b&gt;x&lt;/b&gt;" not in text.split("</style>")[0]
    assert "<b>x" not in text and "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text and r"\x1b[2J" in text


def test_a_run_that_cannot_be_read_is_there_with_the_reason_and_the_others_go_on() -> None:
    bad = ComparedRun(Path("c"), problem="metrics.jsonl: 2 of 3 lines cannot be read")
    text = page(run("a", rate="1"), run("b", rate="2"), bad)
    assert "unreadable" in text and bad.problem in text and '<td class="name" data-label="Key"><div>rate' in text


def test_curves_of_all_runs_stand_in_one_plot_and_how_they_ran_is_folded() -> None:
    text = page(run("a"), run("b"))
    assert text.count("loss of a, b") == 1
    assert text.index("loss of a, b") < text.index("how the runs ran") < text.index("images_per_second of a, b")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_every_vqvae_reconstructs_the_same_held_out_images(world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.root / "vqvae", tmp_path / "b")
    export_vqvae(tmp_path / "other", data="sha256:other")
    export_vqvae(tmp_path / "far", data="sha256:0", resolution=32)
    runs = {"a": run(world.root / "vqvae"), "b": run(tmp_path / "b"), "other": run(tmp_path / "other")}
    runs |= {"gone": run(tmp_path / "gone"), "far": run(tmp_path / "far")}
    runs["a"] = dataclasses.replace(runs["a"], facts={"data": str(world.root / "pack")})
    rows, omitted = compare_reconstructions(runs, "", 3)
    assert list(rows) == ["original", "a", "b"]
    assert all(torch.equal(image, world.holdout[n]) for n, (image, _, _) in enumerate(rows["original"]))
    assert [what for _, what, _ in rows["b"]] == ["disc, 000000", "stripes, 000001", "plain, 000002"]
    assert all(caption.endswith(" dB") for _, _, caption in rows["a"])
    assert omitted.keys() == {"other", "gone", "far"}
    assert "its data is sha256:other" in omitted["other"] and "no run and no exported model" in omitted["gone"]
    given, _ = compare_reconstructions({"other": runs["other"]}, str(world.root / "pack"), 1)
    assert list(given) == ["original", "other"]
    nowhere, why = compare_reconstructions({"other": runs["other"]}, "", 1)
    assert nowhere == {} and "data=DATASET" in why["other"]


def write_samples(folder: Path, keys: Mapping[str, int], value: int, per_shard: int = 3) -> None:
    folder.mkdir()
    shards = []
    for first in range(0, len(keys), per_shard):
        with ShardWriter(folder / f"{first:06d}.tar") as writer:
            for key, label in list(keys.items())[first : first + per_shard]:
                image = torch.full((3, 8, 8), value + int(key), dtype=torch.uint8)
                writer.write(key, {"png": png_bytes(image), "cls": str(label).encode()})
        assert writer.info is not None
        shards.append(writer.info)
    Manifest.of("samples", shards, ["cat", "dog"], {"resolution": 8, "format": "png"}).save(folder)


def test_samples_of_equal_class_and_key_stand_side_by_side(tmp_path: Path) -> None:
    write_samples(tmp_path / "a", {f"{n}": n // 4 for n in range(8)}, 0)
    write_samples(tmp_path / "b", {f"{n}": n // 5 for n in (7, 6, 5, 4, 3, 2, 1)}, 100)
    runs = {name: run(tmp_path / name, "sample") for name in ("a", "b", "gone")}
    pictures, omitted = compare_samples(runs, 2, 20)
    assert omitted.keys() == {"gone"} and "dataset.json does not exist" in omitted["gone"]
    values = {
        label: {name: [(what, int(image[0, 0, 0])) for image, what, _ in row] for name, row in rows.items()}
        for label, rows in pictures.items()
    }
    assert values == {
        "cat": {"a": [("1", 1), ("2", 2)], "b": [("1", 101), ("2", 102)]},
        "dog": {"a": [("5", 5), ("6", 6)], "b": [("5", 105), ("6", 106)]},
    }
    assert list(compare_samples(runs, 2, 1)[0]) == ["dog"]
    assert compare_samples(runs, 0, 20)[0] == {}
    (tmp_path / "b" / "000000.tar").write_bytes(bytes(9_000))
    pictures, omitted = compare_samples(runs, 2, 20)
    assert "damaged" in omitted["b"] and list(pictures["cat"]) == ["a"]
