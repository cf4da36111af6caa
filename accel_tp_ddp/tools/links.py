"""Whether the ranks of a launch see each other: what `doctor` does on each of them.

Nothing is tried that could wait for ever: the ranks meet at the launcher's store, tell it what they are, try plain
sockets to one another, and only then make a process group. Each step says who did not come, or did not answer.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..core.errors import PlanError
from ..core.upstream import installed_version
from ..plans.plan import resolve_plan
from ..plugin.config import TensorParallelDDPPlugin
from ..proof.prove import prove_plan

__all__ = ["Finding", "check_ranks", "interfaces"]

_SMALL, _LARGE = 64 * 2**10, 8 * 2**20


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen there, and, where that is not as it should be, what to change."""

    check: str
    told: str
    fix: str | None = None


class _Stop(Exception):
    """What was found makes the steps after it pointless."""

    def __init__(self, *findings: Finding):
        self.findings = findings


def check_ranks(tp_size: int | None, timeout: float) -> list[Finding]:
    """All checks, on this rank of a launch, with all others. Every rank gets the same list, as far as they meet."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found: list[Finding] = []
    with _watched(6 * timeout + 60) as step:
        try:
            step("the launcher's store")
            ranks = _Ranks(_store(rank, world, timeout), rank, world, timeout)
            step("all ranks to come")
            everyone = ranks.tell("hello", _self(rank, tp_size))
            found += _compare(everyone)
            step("connections from rank to rank")
            found += _reach(ranks, everyone)
            step("a process group")
            found += _group(ranks, everyone)
            step("the tensor-parallel links")
            found += _measure(ranks, everyone)
            step("the proof of a small plan")
            found += _prove(ranks, everyone)
        except _Stop as stop:
            found += stop.findings
        if dist.is_initialized():
            step("all ranks to end")
            with suppress(_Stop):
                ranks.tell("end", None)
            dist.destroy_process_group()
            time.sleep(0.5 * (rank == 0))  # the store may be the first rank's, and others may still read
    return found


@contextmanager
def _watched(seconds: float) -> Iterator[Callable[[str], None]]:
    """End this process, with a line, if the block takes longer: what hangs in C cannot be interrupted otherwise."""
    now = ["starting"]

    def end() -> None:
        where = f"rank {os.environ['RANK']} on {platform.node()}"
        line = f"accel-tp-ddp doctor: {where} has waited {seconds:.0f} s for {now[0]}, and gives up"
        print(line, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what: now.__setitem__(0, what)
    finally:
        timer.cancel()


def _store(rank: int, world: int, timeout: float) -> Any:
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    told = f"rank {rank} on {platform.node()} looks for the first rank at MASTER_ADDR={address}, MASTER_PORT={port}"
    name = "`main_process_ip` in the launcher's YAML, or `--main_process_ip` (torchrun: `--master_addr`)"
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, ValueError, UnicodeError) as error:
        fix = f"Set {name} to an address of the first host that this one can resolve."
        raise _Stop(Finding("address", f"{told}: no such address ({error})", fix)) from None
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
    if rank == 0 and not _is_own(address):
        own = ", ".join(f"{ip} ({nic})" for nic, ip in interfaces().items())
        fix = f"Set {name} to one of those of this host: {own}."
        raise _Stop(Finding("address", f"{told}, which is no address of its own host", fix))
    try:
        return dist.TCPStore(
            *(address, int(port), world, rank == 0 and not is_agents),
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0].split(" Exception raised")[0]
        fix = f"See that the first host runs, set {name} right, and open that port in its firewall."
        raise _Stop(Finding("address", f"{told}: nobody answers within {timeout:.0f} s ({said})", fix)) from None


class _Ranks:
    """The ranks of the launch, who tell one another values through the store."""

    def __init__(self, store: Any, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = dist.PrefixStore("doctor", store), rank, world, timeout

    def tell(self, step: str, value: Any) -> list[Any]:
        """The value of each rank, in rank order.

        Raises:
            _Stop: If some do not come in time.
        """
        keys = [f"{step}/{rank}" for rank in range(self.world)]
        try:
            self.store.set(keys[self.rank], json.dumps(value))
            self._wait_for(step, keys)
            return [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:
            told = f"the launcher's store has gone at the step {step!r}: {str(error).splitlines()[0]}"
            raise _Stop(
                Finding("ranks", told, "See what the first host's launcher, or the first rank, says.")
            ) from None

    def _wait_for(self, step: str, keys: list[str]) -> None:
        deadline = time.monotonic() + self.timeout
        while missing := [rank for rank, key in enumerate(keys) if not self.store.check([key])]:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, missing))
                told = f"of {self.world} ranks, {names} did not come to the step {step!r} within {self.timeout:.0f} s"
                fix = (
                    "Start the launcher on every host, with the same --num_machines and --num_processes and its own "
                    "--machine_rank; where hosts start late, give --timeout more seconds."
                )
                raise _Stop(Finding("ranks", told, fix))
            time.sleep(0.02)


def _self(rank: int, tp_size: int | None) -> dict[str, Any]:
    nic, problem = os.environ.get("GLOO_SOCKET_IFNAME"), None
    own = interfaces()
    if nic and own and nic not in own:
        problem = f"has no interface {nic!r} with an address (GLOO_SOCKET_IFNAME); it has {', '.join(own)}"
    sizes: dict[str, Any] = {"tp": 1, "dp": 1}
    try:
        plugin = TensorParallelDDPPlugin(tp_size=tp_size)
        plugin._settle_sizes(int(os.environ["WORLD_SIZE"]))
        sizes = {"tp": plugin.tp_size, "dp": plugin.dp_replicate_size}
    except ValueError as error:
        sizes["problem"] = str(error)
    return {
        **{"host": platform.node(), "address": _gloo_address(own), "interface": problem, "sizes": sizes},
        **{"machine": os.environ.get("GROUP_RANK", platform.node()), "device": _device()},
        "versions": {name: installed_version(name) for name in ("torch", "accelerate", "transformers")},
    }


def _compare(everyone: list[dict[str, Any]]) -> list[Finding]:
    """What the ranks have told of themselves."""
    first, machines = everyone[0], list(dict.fromkeys(each["machine"] for each in everyone))
    where = []
    for machine in machines:
        there = [rank for rank, each in enumerate(everyone) if each["machine"] == machine]
        where.append(f"{everyone[there[0]]['host']} ({everyone[there[0]]['address']}): ranks {_told(there)}")
    tp, dp = first["sizes"]["tp"], first["sizes"]["dp"]
    found = [
        Finding("ranks", f"{len(everyone)} on {len(machines)} host{'s' * (len(machines) > 1)}; {'; '.join(where)}"),
        Finding("layout", f"tp {tp} x dp {dp} on {first['device']}"),
    ]
    wrong: list[Finding] = []
    for rank, each in enumerate(everyone):
        if each["interface"]:
            fix = "Set GLOO_SOCKET_IFNAME (GPUs: NCCL_SOCKET_IFNAME too) to one that it has, or leave it out."
            wrong.append(Finding("interface", f"rank {rank} on {each['host']} {each['interface']}", fix))
        if len(machines) > 1 and each["address"].startswith("127."):
            fix = "Set GLOO_SOCKET_IFNAME to the interface between the hosts, or correct /etc/hosts."
            told = f"rank {rank} on {each['host']} would give other hosts its address as {each['address']}"
            wrong.append(Finding("interface", told, fix))
        if each["versions"] != first["versions"]:
            told = f"rank {rank} on {each['host']} has {each['versions']}, rank 0 {first['versions']}"
            wrong.append(Finding("versions", told, "Install the same releases on every host."))
    if first["sizes"].get("problem"):
        wrong.append(Finding("layout", first["sizes"]["problem"], "Correct the sizes in the launcher's YAML."))
    elif tp == 1 and len(everyone) > 1:
        fix = "Add `parallelism_config: {parallelism_config_tp_size: 2}` to the launcher's YAML, or pass --tp_size."
        found.append(Finding("layout", "no tensor parallelism is asked for", fix))
    if any(each["sizes"] != first["sizes"] for each in everyone):
        sizes = [(each["sizes"]["tp"], each["sizes"]["dp"]) for each in everyone]
        wrong.append(Finding("layout", f"(tp, dp) differ over the ranks: {sizes}", "Launch every host with one YAML."))
    for start in range(0, len(everyone) if tp > 1 else 0, tp):
        hosts = {each["machine"] for each in everyone[start : start + tp]}
        if len(hosts) > 1:
            told = f"the ranks {start} to {start + tp - 1} share one replica over {len(hosts)} hosts"
            fix = (
                f"Set tp_size to a divisor of {len(everyone) // len(machines)}, the ranks of a host; it is slow else."
            )
            found.append(Finding("layout", told, fix))
            break
    if wrong:
        raise _Stop(*found, *wrong)
    return found


def _reach(ranks: _Ranks, everyone: list[dict[str, Any]]) -> list[Finding]:
    """A plain socket from each rank to each other one."""
    with socket.socket() as server:
        server.bind((everyone[ranks.rank]["address"], 0))
        server.listen(ranks.world)
        ports = ranks.tell("ports", server.getsockname()[1])
        failed: dict[int, str] = {}
        patience = min(5.0, ranks.timeout / 2)
        tries = [
            threading.Thread(target=_try, args=(failed, other, each["address"], port, patience))
            for other, (each, port) in enumerate(zip(everyone, ports))
            if other != ranks.rank
        ]
        for each in tries:
            each.start()
        for each in tries:
            each.join()
        answers = ranks.tell("reach", failed)
    wrong = []
    for rank, failures in enumerate(answers):
        for other, error in failures.items():
            host, there = everyone[rank]["host"], everyone[int(other)]
            told = f"rank {rank} on {host} cannot reach rank {other} on {there['host']} at {there['address']}: {error}"
            fix = "Open the hosts' ports to each other, or name the interface between them by GLOO_SOCKET_IFNAME."
            wrong.append(Finding("links", told, fix))
    if wrong:
        raise _Stop(*wrong)
    return [Finding("links", f"each of {ranks.world} ranks reaches each other one")]


def _try(failed: dict[int, str], rank: int, address: str, port: int, patience: float) -> None:
    try:
        socket.create_connection((address, port), patience).close()
    except OSError as error:
        failed[rank] = str(error)


def _group(ranks: _Ranks, everyone: list[dict[str, Any]]) -> list[Finding]:
    device, problem = everyone[0]["device"], None
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
    try:
        if device != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", ranks.store),
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=ranks.timeout),
        )
        total = torch.ones(1, device=device)
        dist.all_reduce(total)
        if total.item() != ranks.world:
            problem = f"a sum of ones over {ranks.world} ranks is {total.item()}"
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    fix = "Set GLOO_SOCKET_IFNAME and, for GPUs, NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO tells what NCCL tries."
    wrong = [
        Finding("backend", f"{backend} fails on rank {rank} on {everyone[rank]['host']}: {each}", fix)
        for rank, each in enumerate(ranks.tell("group", problem))
        if each
    ]
    if wrong:
        raise _Stop(*wrong)
    return [Finding("backend", f"{backend}: a process group of {ranks.world} ranks")]


def _measure(ranks: _Ranks, everyone: list[dict[str, Any]]) -> list[Finding]:
    """Time of an all-reduce in each tensor-parallel group, all of them at once, as in training."""
    tp, dp, device = everyone[0]["sizes"]["tp"], everyone[0]["sizes"]["dp"], everyone[0]["device"]
    if tp == 1:
        return []
    group = init_device_mesh(device, (dp, tp), mesh_dim_names=("dp_replicate", "tp"))["tp"].get_group()
    times = []
    for size in (_SMALL, _LARGE):
        tensor, taken = torch.ones(size // 4, device=device), []
        for _ in range(6):
            begun = time.perf_counter()
            dist.all_reduce(tensor, group=group)
            tensor[0].item()  # waits for the device
            taken.append(time.perf_counter() - begun)
        times.append(min(taken[1:]))
    found, speeds = [], {}
    for rank, (small, large) in list(enumerate(ranks.tell("links", times)))[::tp]:
        speeds[rank] = 2 * (tp - 1) / tp * _LARGE / large / 1e9
        told = f"ranks {rank} to {rank + tp - 1}: an all-reduce of 8 MiB takes {large * 1e3:.2f} ms"
        told = f"{told} ({speeds[rank]:.2f} GB/s on each link), of 64 KiB {small * 1e6:.0f} us"
        found.append(Finding("bandwidth", told))
    slowest = min(speeds, key=lambda rank: speeds[rank])
    if device != "cpu" and speeds[slowest] < max(speeds.values()) / 3:
        told = f"the links of ranks {slowest} to {slowest + tp - 1} are three times slower than the best ones"
        found.append(Finding("bandwidth", told, "See `nvidia-smi topo -m`, and choose tp_size within one switch."))
    return found


def _prove(ranks: _Ranks, everyone: list[dict[str, Any]]) -> list[Finding]:
    tp, dp, problem = everyone[0]["sizes"]["tp"], everyone[0]["sizes"]["dp"], None
    if tp == 1:
        return []
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16 * tp, "intermediate_size": 32 * tp, "num_attention_heads": 2 * tp}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, num_key_value_heads=tp, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    try:
        mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp_replicate", "tp"))["tp"]
        prove_plan(model, mesh, resolve_plan(model, tp), "auto", "always")
    except (PlanError, RuntimeError) as error:
        problem = " ".join(str(error).split())
    wrong = [f"rank {rank}: {each}" for rank, each in enumerate(ranks.tell("proof", problem)) if each]
    if wrong:
        fix = "Report it with the versions above: `accel-tp-ddp verify` says what differs."
        return [Finding("proof", f"a small Llama, sharded, does not compute the same: {wrong[0]}", fix)]
    return [Finding("proof", f"a small Llama at tp {tp} gives the outputs and gradients that it gives unsharded")]


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one; empty where the system does not tell."""
    try:
        import fcntl
    except ImportError:  # not on Linux
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    any_socket.fileno(), 0x8915, struct.pack("256s", name.encode()[:15])
                )  # SIOCGIFADDR
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _gloo_address(own: dict[str, str]) -> str:
    """As torch chooses it for gloo: of the interface that is named, else of the host's name, else the loopback's."""
    nic = os.environ.get("GLOO_SOCKET_IFNAME")
    if nic in own:
        return own[nic]
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
    return address if _is_own(address) else "127.0.0.1"


def _is_own(address: str) -> bool:
    try:
        with socket.socket() as mine:
            mine.bind((socket.gethostbyname(address), 0))
    except OSError:
        return False
    return True


def _device() -> str:
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return "cpu" if on_cpu or not torch.accelerator.is_available() else torch.accelerator.current_accelerator().type


def _told(ranks: list[int]) -> str:
    whole = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 2
    return f"{ranks[0]} to {ranks[-1]}" if whole else ", ".join(map(str, ranks))
