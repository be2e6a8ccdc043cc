"""The sdist and the wheel: what they hold, and that an installed wheel needs nothing of the clone."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORK = ("configs", "launch", "slurm")  # what `vqscale new` copies
PACKED = ("vqscale", *WORK, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
NOT_PACKED = ("__pycache__", "*.pyc", "site.sh", ".new-*")
ELSEWHERE = """
import sys, vqscale
from vqscale import cli
assert vqscale.__file__.startswith(sys.prefix), vqscale.__file__
assert cli.main(["pack", "configs/debug/pack.yaml"]) == 0
vqvae = vqscale.VQVAE.from_pretrained(sys.argv[1])
images = vqscale.sample(sys.argv[1], classes=[vqvae.classes[0]], samples_per_class=1)
print([tuple(codes.shape) for codes in vqvae.encode(images)], tuple(vqvae.decode(vqvae.encode(images)).shape))
"""


def files_of(folder: Path) -> set[str]:
    """Paths below the root of what a folder of the clone gives to the wheel."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name != "site.sh")
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*NOT_PACKED))
        else:
            shutil.copy(ROOT / name, source)
    (source / "slurm" / "site.sh").write_text("# one cluster's own\n")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_has_the_package_and_what_users_start_from(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    data = next(name for name in entries if ".data/" in name).split("/")[0] + "/data/share/vqscale/"
    assert {name for name in entries if name.startswith("vqscale/")} == files_of(ROOT / "vqscale")
    shared = {name.removeprefix(data) for name in entries if name.startswith(data)}
    assert shared == {name for folder in WORK for name in files_of(ROOT / folder)}
    assert entries[f"{data}slurm/pipeline.sh"].external_attr >> 16 & stat.S_IXUSR
    rest = {Path(name).name for name in entries if not name.startswith(("vqscale/", data))}
    assert rest == {"LICENSE", "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt"}


def test_the_sdist_has_what_the_wheel_is_made_of(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "slurm/common.sh"} <= names
    assert "slurm/site.sh" not in names and not any(name.startswith(("tests", "docs", "examples")) for name in names)


def test_an_installed_wheel_needs_nothing_of_the_clone(built: Path, tmp_path: Path) -> None:
    """In an environment with the dependencies of this one: a new folder, the first stage, a sample there and back."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(others))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*words: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run([str(w) for w in words], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert run(python.with_name("vqscale"), "new", "work").startswith("work: configs, launch, slurm; next:")
    printed = run(python, "-c", ELSEWHERE, ROOT / "examples" / "clipart64", cwd=tmp_path / "work")
    assert printed.splitlines()[-1] == "[(1, 8, 8), (1, 16, 16)] (1, 3, 64, 64)"
    assert (tmp_path / "work" / "runs" / "debug" / "pack" / "train" / "dataset.json").is_file()
