"""Several hosts made of network namespaces on this machine: each has its own address, on eth0.

Each has another interface too, other0, whose address no other host can reach.

    with Hosts(2) as hosts:
        hosts.start(0, "python", "-m", ...)     # a process there

Needs root and `ip` (iproute2). The namespaces share the disk, the memory and the host name of the machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from .launched import user_environment

__all__ = ["CAN_MAKE_HOSTS", "Hosts"]


def _can_make_hosts() -> bool:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0


CAN_MAKE_HOSTS = _can_make_hosts()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    def __init__(self, count: int):
        self.names = [f"at{os.getpid()}h{number}" for number in range(count)]
        self.switch = f"at{os.getpid()}sw"
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self.started: list[subprocess.Popen] = []

    def __enter__(self) -> Hosts:
        try:
            _ip("netns", "add", self.switch)
            _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self.switch, "link", "set", "br0", "up")
            for number, (name, address) in enumerate(zip(self.names, self.addresses)):
                _ip("netns", "add", name)
                port = f"port{number}"
                _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self.switch)
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                _ip("-n", name, "link", "add", "other0", "type", "veth", "peer", "name", "other1")
                _ip("-n", name, "addr", "add", f"10.78.{number}.1/24", "dev", "other0")
                for interface in ("lo", "eth0", "other0", "other1"):
                    _ip("-n", name, "link", "set", interface, "up")
                _ip("-n", self.switch, "link", "set", port, "master", "br0")
                _ip("-n", self.switch, "link", "set", port, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def cut(self, number: int) -> None:
        """Take a host's cable out: what is under way to it and from it gets no answer, and no refusal either."""
        _ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def command_lines(self, number: int) -> list[str]:
        """Of the processes of a host."""
        found = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True)
        files = [Path("/proc", pid, "cmdline") for pid in found.stdout.split()]
        return [file.read_bytes().replace(b"\0", b" ").decode() for file in files if file.exists()]

    def start(self, number: int, *words: str, cwd: Path, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *words],
            cwd=cwd,
            env=user_environment(**{"ACCELERATE_USE_CPU": "true", **environment}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process
