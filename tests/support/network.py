"""Machines on this one: processes with a network and a host name of their own, and a slow switch that loses frames.

A node is a thread in Linux namespaces of its own, from which its processes are started. Its one interface is a TAP
device, and the switch, another thread, carries Ethernet frames between these. The namespaces live as long as what is in
them, and nothing has to be cleaned up: they, the devices and the addresses are gone with this process at the latest.
Needs root, /dev/net/tun, `ip` (iproute2) and `setpriv` (util-linux), but no netem.
"""

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
_CLONE_NEWNET, _CLONE_NEWUTS = 0x40000000, 0x04000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_MTU = 9_000
_BROADCAST = 0xFF  # as the last byte of an address: ours are 02:00:00:00:00:<number>


def why_not() -> str:
    """What this machine lacks; empty where nodes can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        Node(0, "10.231.0.1").close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespace with a TAP device here: {error}"
    return ""


class Node:
    """One machine. `start` runs a command on it."""

    def __init__(self, number: int, address: str):
        """Raises OSError where the system does not allow it, and where there is no `ip`."""
        self.number, self.address = number, address
        self._started: list[subprocess.Popen[bytes]] = []
        self._inside = ThreadPoolExecutor(1)
        self.tap: int = self._inside.submit(self._move_in).result()

    def _move_in(self) -> int:
        """This thread alone leaves the machine's namespaces, and what it starts from now on with it."""
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET | _CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), "unshare")
        socket.sethostname(f"node{self.number}")
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", INTERFACE.encode(), _IFF_TAP | _IFF_NO_PI))
        link = ["link", "set", INTERFACE, "mtu", str(_MTU), "address", f"02:00:00:00:00:{self.number:02x}", "up"]
        for words in (["link", "set", "lo", "up"], link, ["addr", "add", f"{self.address}/24", "dev", INTERFACE]):
            subprocess.run(["ip", *words], check=True)
        return tap

    def start(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
        """As `subprocess.Popen`; it dies with this process, however that ends."""
        mortal = ["setpriv", "--pdeathsig", "KILL", *command]
        process = self._inside.submit(subprocess.Popen, mortal, **options).result()
        self._started.append(process)
        return process

    def kill(self) -> None:
        """All of its processes at once, as when its power is cut."""
        for process in self._started:
            for pid in (*_descendants(process.pid), process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self._started = []

    def close(self) -> None:
        self.kill()
        os.close(self.tap)
        self._inside.shutdown()


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _descendants(int(child))
            yield int(child)


class Network:
    """Nodes 10.231.0.1, 10.231.0.2, … and the switch between them."""

    def __init__(self, nodes: int, *, delay: float, loss: float):
        """delay: seconds that a frame takes. loss: share of the frames that never arrive."""
        self.nodes = [Node(number, f"10.231.0.{number + 1}") for number in range(nodes)]
        self.frames = self.lost = 0
        self._delay, self._loss, self._chance = delay, loss, random.Random(0)
        self._unplugged: set[int] = set()
        self._stop = threading.Event()
        self._switch = threading.Thread(target=self._carry, daemon=True)
        self._switch.start()

    def unplug(self, node: Node) -> None:
        """Its link is down from now on: nobody is told that its connections have ended."""
        self._unplugged.add(node.number)

    def _carry(self) -> None:
        taps = {node.tap: node.number for node in self.nodes}
        poll = select.poll()
        for tap in taps:
            poll.register(tap, select.POLLIN)
        waiting: list[tuple[float, int, bytes, int]] = []  # due at, number, frame, from
        while not self._stop.is_set():
            pause = 100.0 if not waiting else max(0.0, 1e3 * (waiting[0][0] - time.monotonic()))
            for tap, _ in poll.poll(min(100.0, pause)):
                frame = os.read(tap, _MTU + 64)
                self.frames += 1
                if self._chance.random() < self._loss:
                    self.lost += 1
                else:
                    heapq.heappush(waiting, (time.monotonic() + self._delay, self.frames, frame, taps[tap]))
            while waiting and waiting[0][0] <= time.monotonic():
                self._deliver(*heapq.heappop(waiting)[2:])

    def _deliver(self, frame: bytes, sender: int) -> None:
        target = frame[5] if frame[0] == 0x02 else _BROADCAST
        for node in self.nodes:
            joined = node.number != sender and target in (node.number, _BROADCAST)
            if joined and not self._unplugged & {sender, node.number}:
                with contextlib.suppress(OSError):  # its queue is full: lost too
                    os.write(node.tap, frame)

    def close(self) -> None:
        self._stop.set()
        self._switch.join()
        for node in self.nodes:
            node.close()


@contextlib.contextmanager
def network(nodes: int, *, delay: float, loss: float) -> Iterator[Network]:
    """A network that is gone, with all that runs in it, when the `with` block ends."""
    made = Network(nodes, delay=delay, loss=loss)
    try:
        yield made
    finally:
        made.close()
