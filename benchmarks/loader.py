"""The loader against what else people use, on JPEGs that become 256 px uint8: images per second, in turns.

    python benchmarks/loader.py [--json FILE] [--quick] [--minutes M] [--workers N]

In: nothing; the pictures are made here (`photos.py`). Two data sets: stored at 256 px, and 500×375 reduced to 256. The
rivals: webdataset read in order, with its own decoding (PIL); torchvision's ImageFolder with PIL and its transforms;
grain over the same tars by our index, with our decoding, so that it compares loaders alone.

Rows: `<data set>/<rival>`, our images per second over the rival's; `<data set>/share of decode limit`, over decoding
alone from memory; `<data set>/cold/<rival>`, one pass each after the kernel was told to forget the files (a local
disk: NFS and Lustre are another matter); `first batch far away`, the time to it at 24e9 consumed samples over that at
0; `order's memory at 1e9`, over a stored permutation. All on one thread of one process, or N loader processes.
"""

import itertools
import os
import shutil
import tempfile
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from measure import Row, arguments, at_least, at_most, finish, in_turns, median, ratio, timed
from photos import Photos, make_photos
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from vqscale.data.images import ImageReader
from vqscale.data.loader import build_loader
from vqscale.data.order import ShuffleOrder
from vqscale.data.shards import Manifest

try:
    import grain
except ImportError:
    grain = None

SIDE, FAR = 256, 24_000_000_000
GOALS: dict[str, float | None] = {"webdataset": 1.2, "imagefolder": None, "grain": None}
Images = Iterator[Iterable[Tensor]]  # batches, each of uint8 [3, 256, 256]


class Contest:
    """The loaders over one data set, as endless streams of batches; `once` ends a stream after one pass."""

    def __init__(self, photos: Photos, batch: int, workers: int, reduce: bool):
        self.photos, self.batch, self.workers, self.reduces = photos, batch, workers, reduce
        shrink = [Resize(SIDE), CenterCrop(SIDE)] if reduce else []
        self.transform = Compose([*shrink, PILToTensor()])
        self.read = ImageReader(SIDE)

    def vqscale(self, once: bool = False) -> Images:
        loader = build_loader(
            self.photos.shards, read=self.read, global_batch=self.batch, shuffle_window=8, workers=self.workers
        )
        batches = (batch["image"] for batch in loader)
        return itertools.islice(batches, self.photos.count // self.batch) if once else batches

    def webdataset(self, once: bool = False) -> Images:
        stream = webdataset.WebDataset(self.photos.tars, shardshuffle=False, empty_check=False)
        stream = stream.decode("pil").map_dict(jpg=self.transform).to_tuple("jpg", "cls")
        stream = (stream if once else stream.repeat()).batched(self.batch, partial=False)
        return (images for images, _ in webdataset.WebLoader(stream, batch_size=None, num_workers=self.workers))

    def imagefolder(self, once: bool = False) -> Images:
        data = ImageFolder(str(self.photos.files), self.transform)
        loader = DataLoader(data, self.batch, shuffle=True, drop_last=True, num_workers=self.workers)
        passes = [loader] if once else itertools.repeat(loader)
        return (images for each in passes for images, _ in each)

    def grain(self, once: bool = False) -> Images:
        data = grain.MapDataset.source(Tars(self.photos)).shuffle(seed=0).map(self._decode)
        data = (data if once else data.repeat()).batch(self.batch, drop_remainder=True)
        stream = data.to_iter_dataset(grain.ReadOptions(num_threads=0))
        if self.workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.workers))
        return (torch.from_numpy(images) for images in stream)

    def _decode(self, data: bytes) -> np.ndarray:
        return self.read({"jpg": data}, 0, 0)["image"].numpy()

    def decoding(self) -> Images:
        """No loader at all: the first files of the data set, from memory."""
        files = [path.read_bytes() for path in sorted(self.photos.files.rglob("*.jpg"))[: 4 * self.batch]]
        while True:
            for first in range(0, len(files) - self.batch + 1, self.batch):
                yield [self.read({"jpg": data}, 0, 0)["image"] for data in files[first : first + self.batch]]

    @property
    def rivals(self) -> list[str]:
        return [name for name in GOALS if name != "grain" or grain is not None]


class Tars:
    """The encoded images of a data set by number: grain's random access source."""

    def __init__(self, photos: Photos):
        manifest = Manifest.load(photos.shards)
        self._where: list[tuple[Path, int, int]] = []  # tar, offset, size
        for shard in range(len(manifest.shards)):
            index, tar = manifest.index(photos.shards, shard), manifest.tar(photos.shards, shard)
            spans = zip(index.offset["jpg"].tolist(), index.size["jpg"].tolist(), strict=True)
            self._where += [(tar, *span) for span in spans]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, number: int) -> bytes:
        tar, offset, size = self._where[number]
        with open(tar, "rb") as file:
            file.seek(offset)
            return file.read(size)


def draw(batches: Images, count: int) -> None:
    """Take `count` batches and look at what they are."""
    for batch in itertools.islice(batches, count):
        assert next(iter(batch)).shape == (3, SIDE, SIDE) and next(iter(batch)).dtype == torch.uint8


def warm(contest: Contest, goals: Mapping[str, float | None], seconds: float) -> dict[str, Row]:
    """All loaders in turns, two batches at a time, files in the page cache."""
    streams: dict[str, Images] = {name: getattr(contest, name)() for name in ("vqscale", *contest.rivals)}
    streams["decoding"] = contest.decoding()
    turns: dict[str, Callable[[], None]] = {name: partial(draw, stream, 2) for name, stream in streams.items()}
    in_turns(turns, contest.photos.count // contest.batch // 2)  # one pass: the page cache, the readers' caches
    taken = in_turns(turns, 200, seconds)
    rows = {name: at_least(goals[name], ratio(taken[name], taken["vqscale"])) for name in contest.rivals}
    if not contest.workers:
        rows["share of decode limit"] = at_least(0.9, ratio(taken["decoding"], taken["vqscale"]), limit=1.0)
    rate = 2 * contest.batch / median(taken["vqscale"])
    print(f"{contest.photos.bytes / contest.photos.count / 1e3:.0f} kB per JPEG; vqscale {rate:.0f} images/s")
    for row in rows.values():
        row["images_per_second"] = rate
    return rows


def cold(contest: Contest, seconds: float) -> dict[str, Row]:
    """One pass each over files that the page cache has forgotten."""

    def one_pass(name: str) -> None:
        draw(getattr(contest, name)(once=True), contest.photos.count)

    folder = contest.photos.shards.parent
    forget(folder)
    first, second = (timed(partial(read_all, folder)) for _ in range(2))
    print(f"reading all files takes {first:.2f} s cold and {second:.2f} s warm")
    turns: dict[str, Callable[[], Any]] = {}
    for name in ("vqscale", "webdataset", "imagefolder"):
        turns[f"forget for {name}"], turns[name] = partial(forget, folder), partial(one_pass, name)
    taken = in_turns(turns, 50, seconds)
    return {name: at_least(None, ratio(taken[name], taken["vqscale"])) for name in ("webdataset", "imagefolder")}


def forget(folder: Path) -> None:
    """Tell the kernel that the files' pages are not needed."""
    for path in folder.rglob("*.*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.read_bytes()


def first_batch(contest: Contest, seconds: float) -> Row:
    """From nothing to a batch, at the start of training and far into it."""

    def start(consumed: int) -> None:
        loader = build_loader(contest.photos.shards, read=contest.read, global_batch=contest.batch, shuffle_window=8)
        loader.load_state_dict(loader.state_dict() | {"consumed_samples": consumed})
        draw((batch["image"] for batch in loader), 1)

    taken = in_turns({"near": partial(start, 0), "far": partial(start, FAR)}, 200, seconds, least=5)
    value = ratio(taken["far"], taken["near"])
    return at_most(1.1, value, limit=1.0, seconds_at_0=median(taken["near"]), seconds_far_away=median(taken["far"]))


def orders_memory() -> Row:
    """Peak bytes of the order of 1e9 samples in 100,000 shards, over the 8 bytes per sample of a stored permutation."""
    sizes = [10_000] * 100_000
    tracemalloc.start()
    order = ShuffleOrder(sizes, seed=0, window=64)
    order.locate(np.arange(FAR, FAR + 1024))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return at_most(0.01, peak / (8 * order.num_samples), megabytes=peak / 1e6)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = arguments(__doc__, minutes=8, devices=("cpu",))
    parser.add_argument("--workers", type=int, default=0, help="loader processes; 0 = this one")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # torch's and PIL's about our rivals' ways
    torch.set_num_threads(1)
    if grain is None:
        print("grain is not installed: left out")
    count, batch, second = (64, 16, 60 * args.minutes) if args.quick else (1024, 64, 60 * args.minutes)
    tree: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="loader-"))
    try:
        for name, size in {"256": (256, 256), "500 to 256": (500, 375)}.items():
            photos = make_photos(folder / name, count, *size, per_shard=count // 8)
            contest = Contest(photos, batch, args.workers, reduce=size != (SIDE, SIDE))
            goals = GOALS | ({"imagefolder": 2.5} if contest.reduces else {})
            tree[name] = warm(contest, goals, 0.25 * second) | {"cold": cold(contest, 0.15 * second)}
        tree["first batch far away"] = first_batch(contest, 0.05 * second)
    finally:
        shutil.rmtree(folder)
    return finish(args, tree | {"order's memory at 1e9": orders_memory()})


if __name__ == "__main__":
    main()
