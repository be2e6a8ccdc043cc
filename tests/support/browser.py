"""Pages in a real browser without a network.

In: a page on disk.  Out: its DOM after its scripts have run.
"""

import shutil
import subprocess
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--proxy-server=127.0.0.1:9", "--virtual-time-budget=10000"),  # whatever asked for the network would fail
)


def dumped(page: Path, profile: Path, *flags: str) -> str:
    assert CHROMIUM is not None
    words = [*QUIET, *flags, f"--user-data-dir={profile}", "--window-size=2000,2000", "--dump-dom", page.as_uri()]
    return subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120, check=True).stdout
