"""Connections between the processes of a run, over which they tell each other that they live.

They are no part of torch's communication: each process listens on a port of its own, and publishes it in the store at
MASTER_ADDR:MASTER_PORT, where the processes of a run find each other anyway. Once connected, nothing depends on that
store, nor on a folder. The system closes the connections of a process that ends, however it ends, so the others know
within milliseconds.

A process is connected with those whose rank is 1, 2, 4, 8, ... more or less than its own, so a run of up to four has
all connections, and a large one few for each process. Given up: links through a firewall that torch may pass and a
free port may not. Processes without a link are not watched by each other.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, final

CONNECT_SECONDS = 2.0
MAX_BYTES = 1 << 20
"""A connection that sends a longer line, or leaves so much unread, is closed."""


def neighbours(rank: int, num_ranks: int) -> list[int]:
    """The ranks that `rank` is connected with."""
    steps = [1 << power for power in range(num_ranks.bit_length()) if 1 << power < num_ranks]
    return sorted({(rank + sign * step) % num_ranks for step in steps for sign in (1, -1)} - {rank})


@final
class Link:
    """A connection with the process `rank`. Any thread may `send`; one thread reads."""

    def __init__(self, connection: socket.socket, rank: int, read: bytes = b"") -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.rank = connection, rank
        self._read, self._unsent, self._lock = read, b"", threading.Lock()

    def send(self, line: bytes) -> bool:
        """Sends a line, at once where the other side has room. Whether all was sent. OSError where it is closed."""
        with self._lock:
            if len(self._unsent) < MAX_BYTES:
                self._unsent += line
            while self._unsent:
                try:
                    self._unsent = self._unsent[self.socket.send(self._unsent) :]
                except (BlockingIOError, InterruptedError):
                    return False
        return True

    def received(self) -> tuple[list[dict[str, Any]], bool]:
        """The records that have come, and whether the other side still has the connection."""
        is_open = True
        try:
            while chunk := self.socket.recv(1 << 16):
                self._read += chunk
            is_open = False
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            is_open = False
        *lines, self._read = self._read.split(b"\n")
        if len(self._read) > MAX_BYTES:
            return [], False
        return [record for line in lines if (record := _record(line)) is not None], is_open


@final
class Links:
    """The connections of the process `rank` of a run of `num_ranks`, whose store is at `master`."""

    def __init__(self, rank: int, num_ranks: int, master: tuple[str, int]) -> None:
        self.rank, self.num_ranks, self._master = rank, num_ranks, master
        self.links: dict[int, Link] = {}
        self.addresses: dict[int, dict[str, Any]] = {}
        self._token = secrets.token_hex(8)
        self._listener = _listener()
        self._listener.setblocking(False)
        self._store: Any = None
        self._waiting: list[tuple[socket.socket, bytes, float]] = []
        os.register_at_fork(after_in_child=self._close_in_child)

    def sockets(self) -> list[socket.socket]:
        """All that can be waited for."""
        own = [link.socket for link in [*self.links.values()]]
        return [self._listener, *own, *(connection for connection, _, _ in self._waiting)]

    def publish(self) -> bool:
        """Says in the store where this process listens. False where the store is not there yet."""
        if (store := self._connected_store()) is None:
            return False
        own = {"hosts": _own_addresses(self._master), "port": self._listener.getsockname()[1], "token": self._token}
        try:
            store.set(f"holdfast/peers/{self.rank}", json.dumps(own))
        except Exception:
            self._store = None
            return False
        return True

    def dial(self, ranks: Iterable[int]) -> list[Link]:
        """New connections to those of `ranks` that can be reached now."""
        made: list[Link] = []
        for rank in ranks:
            address = self._look_up(rank) or self.addresses.get(rank)
            if address is None:
                continue
            self.addresses[rank] = address
            if (link := self._dialled(rank, address)) is not None:
                self.links[rank] = link
                made.append(link)
        return made

    def accept(self) -> list[Link]:
        """New connections that other processes have made."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._waiting.append((connection, b"", time.monotonic()))
        made, still = [], []
        for connection, read, since in self._waiting:
            with contextlib.suppress(BlockingIOError, InterruptedError, OSError):
                read += connection.recv(1 << 16)
            line, end, rest = read.partition(b"\n")
            hello = _record(line) if end else None
            if hello is not None and hello.get("token") == self._token and isinstance(hello.get("rank"), int):
                self.drop(hello["rank"])
                link = self.links[hello["rank"]] = Link(connection, hello["rank"], rest)
                made.append(link)
            elif end or time.monotonic() - since > 10 * CONNECT_SECONDS or len(read) > 4096:
                connection.close()
            else:
                still.append((connection, read, since))
        self._waiting = still
        return made

    def drop(self, rank: int) -> None:
        """Closes the connection with a process, if there is one."""
        if (link := self.links.pop(rank, None)) is not None:
            link.socket.close()

    def send_all(self, line: bytes) -> bool:
        """Sends a line to all; whether all was sent."""
        is_sent = True
        for link in [*self.links.values()]:
            with contextlib.suppress(OSError):
                is_sent &= link.send(line)
        return is_sent

    def _dialled(self, rank: int, address: dict[str, Any]) -> Link | None:
        for host in address["hosts"]:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((host, address["port"]), timeout=CONNECT_SECONDS)
                link = Link(connection, rank)
                link.send(json.dumps({"rank": self.rank, "token": address["token"]}).encode() + b"\n")
                return link
        return None

    def _connected_store(self) -> Any:
        """The store of the run; None where nobody listens there."""
        if self._store is None:
            from torch.distributed import TCPStore

            try:
                socket.create_connection(self._master, timeout=CONNECT_SECONDS).close()  # torch writes pages where not
                timeout = timedelta(seconds=10 * CONNECT_SECONDS)
                self._store = TCPStore(*self._master, is_master=False, wait_for_workers=False, timeout=timeout)
            except Exception:
                return None
        return self._store

    def _look_up(self, rank: int) -> dict[str, Any] | None:
        """Where another process listens; None where it has not said so."""
        key = f"holdfast/peers/{rank}"
        try:
            store = self._connected_store()
            return json.loads(store.get(key)) if store is not None and store.check([key]) else None
        except Exception:
            self._store = None
            return None

    def _close_in_child(self) -> None:
        """A forked child has none of the connections, so that they end with this process alone."""
        for each in self.sockets():
            with contextlib.suppress(OSError):
                os.close(each.fileno())


def _listener() -> socket.socket:
    """A socket that listens on a free port of every address of this host."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
    return socket.create_server(("", 0), backlog=128)


def _own_addresses(master: tuple[str, int]) -> list[str]:
    """Addresses under which others may reach this host: the one that reaches the master first."""
    found: list[str] = []
    for family, target in (
        (socket.AF_INET, master),
        (socket.AF_INET6, master),
        (socket.AF_INET, ("10.255.255.255", 1)),
    ):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing, and tells the address that would be sent from
            found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys(found))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
