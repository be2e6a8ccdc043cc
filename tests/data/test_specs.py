from pathlib import Path

import pytest
from support.file_calls import counted
from support.ranks import on_ranks

from vqscale.data.specs import expand_spec


def test_braces_globs_and_folders(tmp_path: Path) -> None:
    paths = [tmp_path / f"data-{n:03d}.tar" for n in range(3)]
    for path in paths:
        path.touch()
    for name in ("readme.txt", "._data-000.tar", ".hidden.tar"):
        (tmp_path / name).touch()
    names = [str(path) for path in paths]
    assert expand_spec(f"{tmp_path}/data-{{000..002}}.tar") == names
    assert expand_spec(f"{tmp_path}/data-{{002,000}}.tar") == [names[2], names[0]]
    assert expand_spec(f"{tmp_path}/*.tar") == expand_spec(str(tmp_path)) == names


def test_urls_keep_their_form_and_order() -> None:
    assert expand_spec("https://host/a/data-{000..001}.tar") == [f"https://host/a/data-00{n}.tar" for n in (0, 1)]
    assert expand_spec("s3://bucket/{b,a}.tar") == ["s3://bucket/b.tar", "s3://bucket/a.tar"]
    assert expand_spec("pipe:cat {0..1}.tar", allow_pipe=True) == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


@pytest.mark.parametrize(
    ("spec", "message"), [("pipe:touch ran", "allow_pipe"), ("ftp://host/x.tar", "read from http")]
)
def test_nothing_is_run_or_fetched(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        expand_spec(spec)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    for spec, message in (("{0..1}.tar", "no tar .*1.tar"), ("*.tgz", "nothing matches"), ("x.tar", "no tar")):
        with pytest.raises(FileNotFoundError, match=message):
            expand_spec(f"{tmp_path}/{spec}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no .tar files"):
        expand_spec(f"{tmp_path}/empty")
    with pytest.raises(ValueError, match="a tar twice"):
        expand_spec(f"{tmp_path}/{{0,0}}.tar")


def test_ranks_share_the_look_for_tars(tmp_path: Path) -> None:
    for n in range(7):
        (tmp_path / f"{n}.tar").touch()
    for spec in (f"{tmp_path}/{{0..6}}.tar", str(tmp_path)):
        with counted(tmp_path) as alone:
            tars = expand_spec(spec)
        with counted(tmp_path) as shared:
            assert on_ranks(3, lambda rank, spec=spec: expand_spec(spec, topology=rank)) == [tars] * 3
        assert shared.of("stat") - alone.of("stat") <= 2 * 2  # each further rank looks for the folder
    errors = on_ranks(3, lambda rank: expand_spec(f"{tmp_path}/{{0..8}}.tar", topology=rank))
    assert [str(error) for error in errors] == [f"source: there is no tar {tmp_path}/7.tar"] * 3
    assert {type(error) for error in errors} == {FileNotFoundError}
