"""The first bytes of a file -> the image format that they begin, or a refusal that says what the file is instead.

In: bytes.  Out: a format's name, its suffix in general.
"""

from vqscale.data.parts import DecodeError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FORMATS = {
    "jpg": (b"\xff\xd8",),
    "png": (PNG_SIGNATURE,),
    "gif": (b"GIF87a", b"GIF89a"),
    "bmp": (b"BM",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "ppm": tuple(b"P%d%c" % (number, blank) for number in range(1, 7) for blank in b" \t\r\n#"),
}
# Compared with the file's first bytes in lower case, behind blanks and a byte order mark.
_OTHERS = {
    "a Git LFS pointer (`git lfs pull` fetches the picture)": (b"version https://git-lfs",),
    "a web page": (b"<!doctype html", b"<html", b"<head", b"<body", b"<script"),
    "an SVG drawing": (b"<svg",),
    "XML (an SVG drawing?)": (b"<?xml", b"<!doctype svg"),
    "JSON": (b"{", b"["),
    "a PDF": (b"%pdf",),
    "PostScript": (b"%!", b"\xc5\xd0\xd3\xc6"),
    "a gzip file": (b"\x1f\x8b",),
    "a bzip2 file": (b"bzh",),
    "an xz file": (b"\xfd7zxz\0",),
    "a zstd file": (b"\x28\xb5\x2f\xfd",),
    "a 7z file": (b"7z\xbc\xaf",),
    "a zip file": (b"pk\3\4", b"pk\5\6"),
    "a rar file": (b"rar!",),
    "a JPEG 2000 picture": (b"\0\0\0\x0cjp  ", b"\xff\x4f\xff\x51"),
    "a JPEG XL picture": (b"\0\0\0\x0cjxl ", b"\xff\x0a"),
    "a Photoshop file": (b"8bps",),
    "an icon": (b"\0\0\1\0", b"icns"),
    "a picture of a kind that is not read (QOI, OpenEXR, DDS, Radiance)": (b"qoif", b"v/1\1", b"dds ", b"#?"),
    "a NumPy array": (b"\x93numpy",),
    "an HDF5 file": (b"\x89hdf",),
    "a Matroska or WebM video": (b"\x1a\x45\xdf\xa3",),
    "a program": (b"\x7felf", b"mz"),
    "a script": (b"#!",),
    "an AppleDouble file of macOS": (b"\0\5\x16\7",),
}
_RIFF = {b"AVI ": "an AVI video", b"WAVE": "a WAV sound"}
_HEIF = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def format_of(data: bytes) -> str:
    """jpg | png | gif | bmp | tiff | ppm | webp | avif. Raises DecodeError for anything else, saying what it is."""
    for name, marks in _FORMATS.items():
        if data.startswith(marks):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp" and {b"avif", b"avis"} & _brands(data):
        return "avif"
    raise DecodeError(f"not an image that can be read here but {_other_kind(data)}")


def _brands(data: bytes) -> set[bytes]:
    """Of an ISO media file: the major brand and the compatible ones."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, size, 4))}


def _other_kind(data: bytes) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((kind for kind, marks in _OTHERS.items() if start.startswith(marks)), "")
    if kind:
        return kind
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], "a RIFF file")
    if data[4:8] == b"ftyp":
        return "a HEIC picture" if _brands(data) & set(_HEIF) else "a video (MP4 or QuickTime)"
    if data[257:262] == b"ustar":
        return "a tar"
    return _unknown_kind(data[:4096])


def _unknown_kind(head: bytes) -> str:
    if not head:
        return "an empty file"
    if not head.strip(b"\0"):
        return "a file of zero bytes" if len(head) > 1 else "a single zero byte"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in head):
        return f"text that begins {head[:24].decode('utf-8', 'replace')!r}"
    return f"a file of unknown kind that begins with the bytes {head[:8].hex(' ')}"
