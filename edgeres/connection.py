"""A client of Dask's: of workers that are started on this machine, or of a scheduler that is there already."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, Dict, Iterator, List

import dask.config
from distributed import Client, LocalCluster, Security

from edgeres.errors import ClusterError, first_line
from edgeres.provenance import cores

ADDRESS = re.compile(r"(tcp|tls|ws|wss)://[^\s/]+:[0-9]+/?")
LOCAL = re.compile(r"local(:([1-9][0-9]{0,2}))?")
CONNECT = 20.0  # seconds to wait for the scheduler
GRACE, LOOK = 3.0, 0.05  # seconds more for what comes behind the connection; between looks whether it is there
PATIENCE = 60.0  # seconds to wait for a first worker, and for another one where all were lost
TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # which are one from Python 3.11 on
LOCALS = 4  # workers of this machine for each of its cores at most: each is a process of some hundred MB


def local_settings() -> Dict[str, Any]:
    """Return Dask's configuration for workers of this machine."""
    environment = dict(dask.config.get("distributed.nanny.pre-spawn-environ"))
    # With it each block of memory is given back and fetched anew: for activations a quarter more of processor time.
    environment.pop("MALLOC_TRIM_THRESHOLD_", None)
    return {
        "distributed.nanny.pre-spawn-environ": environment,
        # Pages about the work, on ports that anybody may read, are left out.
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
    }


@contextlib.contextmanager
def started(address: str) -> Iterator[Client]:
    """Start workers on this machine, which end with this process; nobody else can give them orders.

    Raises:
        ClusterError: they are too many for it, or do not all start in time.
    """
    found = LOCAL.fullmatch(address)
    workers = int(found[2]) if found and found[2] else cores()
    if workers > LOCALS * cores():
        raise ClusterError(
            f"{address} would start {workers} processes on {cores()} cores. Take {LOCALS * cores()} at most, or local, "
            "which starts one for each core"
        )
    with contextlib.ExitStack() as held:
        held.enter_context(dask.config.set(local_settings()))
        cluster = LocalCluster(
            n_workers=0,
            threads_per_worker=max(1, cores() // workers),
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # else a port that others may have
            silence_logs=logging.CRITICAL,  # what goes wrong is told by our own words
            security=Security.temporary(),  # or any user of this machine could connect, and run code as this one
        )
        held.callback(_closed, cluster)
        cluster.sync(_deafen)
        cluster.scale(workers)
        # In a thread, which no Ctrl-C leaves half-way: of half a client there is nothing to close.
        opened = held.enter_context(ThreadPoolExecutor(1)).submit(
            Client, cluster, timeout=CONNECT, set_as_default=False
        )
        held.callback(lambda: _closed(opened.result()))
        client = opened.result()
        try:
            client.wait_for_workers(workers, timeout=PATIENCE)
        except TIMEOUTS:
            raise ClusterError(
                f"{workers} workers of this machine did not all start within {PATIENCE:.0f} s: it may be short of "
                "memory, or busy. Start fewer, such as local:1; what is finished is kept"
            ) from None
        yield client


async def _deafen() -> None:
    """Keep Ctrl-C, which a terminal sends to all of a program's processes, from the workers, which this thread starts:
    they are ended by this process, and not in the midst of an import, with a traceback."""
    resource_tracker.ensure_running()  # which lets it through again where it starts, as the first worker would have it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    if not ADDRESS.fullmatch(address):
        raise ClusterError(
            f"{address!r} is no cluster. Name a Dask scheduler (tcp://HOST:8786, tls://HOST:8786), or local, or local:4"
        )
    encrypted = address.startswith(("tls:", "wss:"))
    if encrypted and Security().get_connection_args("client").get("ssl_context") is None:
        raise ClusterError(
            f"{address} is reached by TLS, and Dask's configuration names no certificates. Say "
            "distributed.comm.tls.ca-file, .client.cert and .client.key in ~/.config/dask/distributed.yaml, or in "
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE, …__CLIENT__CERT and …__CLIENT__KEY"
        )
    client = _client(address)
    try:
        yield client
    finally:
        _closed(client)


class _Client(Client):  # type: ignore[misc]
    """A client that is closed by the block that it is made for, and not by garbage collection: where nobody answered,
    that would wait for as long again."""

    def __del__(self) -> None:
        pass


def _client(address: str) -> Client:
    """Return a client of a scheduler.

    Whoever accepts a connection and says nothing, or no end of something else, has no more time than one that is not
    there: Dask's own limit is for the connection alone.

    Raises:
        ClusterError: nobody answers, or no scheduler does.
    """
    found: List[Any] = []

    def connect() -> None:
        try:
            found.append(_Client(address, timeout=CONNECT, set_as_default=False))
        except Exception as problem:  # as many kinds as there are ways to fail
            found.append(problem)

    threading.Thread(target=connect, name="edgeres-connect", daemon=True).start()
    until = time.monotonic() + CONNECT + GRACE
    while not found and time.monotonic() < until:
        time.sleep(LOOK)
    if not found:
        raise ClusterError(
            f"something accepts connections at {address}, but does not answer as a Dask scheduler within "
            f"{CONNECT + GRACE:.0f} s. Check the address: a scheduler prints it when it starts"
        )
    if isinstance(found[0], Exception):
        raise ClusterError(
            f"no Dask scheduler answers at {address} within {CONNECT:.0f} s ({first_line(found[0])}). Start one: "
            "dask scheduler; and workers: dask worker ADDRESS"
        )
    return found[0]


def _closed(one: Any) -> None:
    """Close what may just be starting, or be gone already; why the block ended is what is to be told."""
    with contextlib.suppress(Exception):
        one.close()
