"""Weights from an object store: free loopback and links of a given bandwidth and delay, beside a raw client in
C.

nginx serves everything from the page cache: our packs, the same checkpoint's files for the peers. `first_s`: the
first tensor is usable; `all_s`: every byte of all tensors is in memory and addressable (one byte of each page
has been read). Ours is verified, and its tensors are compared with the checkpoint after the clock; nobody else's
are verified.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import harness, links, loading, servers
from benchmarks.checkpoint import Checkpoint
from benchmarks.harness import Bar, Contestant, Metric, Results, Round
from benchmarks.links import Link, LinkUnavailableError, Shape
from benchmarks.loading import Node, Peer, say
from benchmarks.servers import Server
from benchmarks.workers import Worker
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.origin import OriginOptions

RAW_CONNECTIONS = 8
RAW_BLOCK_BYTES = 8 << 20
PORT, S3_PORT = 80, 9_000
"""AWS's C runtime speaks to no port but 80 without TLS. Only root may listen there."""
SLOW_OF_256 = 3
"""About 1 % of the ranges are slow."""
SHAPED_RATIO_MAX = 1.03
FIRST_ROUND_TRIPS, FIRST_EXTRA_S = 3, 0.1
LOOPBACK_RATIO_MIN = 0.72
BEHIND_RATIO_MAX = 1.1
SLOW_RATIO_MAX = 1.5
RAW, OURS, OURS_S3, WITHOUT, SLOW = (
    "raw C client",
    "snowdrop",
    "snowdrop s3",
    "snowdrop, no disk",
    "snowdrop, 1 % slow",
)
METRICS = (
    Metric(name="first_s", better="lower", digits=3, plot=True),
    Metric(name="all_s", better="lower", digits=3, plot=True),
    Metric(name="durable_s", better="lower", digits=3),
    Metric(name="peak_mib", better="lower", digits=0),
    Metric(name="cpu_s", better="lower"),
    Metric(name="restart_origin_mib", better="lower", digits=0),
)


class Place:
    """A server and a client's end, on loopback or with a link between them; the folder that is served."""

    def __init__(
        self, scratch: Path, model: Checkpoint, artefact: ArtefactRef, server: Server, s3: Server
    ) -> None:
        self.scratch = scratch
        self.model = model
        self.artefact = artefact
        self.server = server
        self.s3 = s3
        self.prefix: Sequence[str] = ()
        self.shape: Shape | None = None

    def aws(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": servers.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": self.s3.url,
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder on the disk, gone afterwards."""
        made = Path(tempfile.mkdtemp(prefix="load-", dir=self.scratch))
        try:
            yield made
        finally:
            shutil.rmtree(made)

    def raw(self) -> Round:
        words = [str(RAW_CONNECTIONS), str(RAW_BLOCK_BYTES), self.server.address, str(self.server.port)]
        for path in self.model.files:
            words += [f"/files/{path.name}", str(path.stat().st_size)]
        command, _ = loading.raw_command("raw_receive", self.scratch, words)
        with Worker(command, prefix=self.prefix) as worker:
            return {"all_s": worker.ask()["usable_s"]}

    def ours(self, url: str, *, disk: bool = True, restart: bool = False, **own: Any) -> Round:
        """A new data plane with an empty cache; then, with `restart`, another one over what that has landed."""
        with self.folder() as cache:
            chosen = loading.settings(url, cache, self.model, disk=disk, **own)
            with Node(chosen, prefix=self.prefix) as node:
                node.prepare(self.model)
                begun = time.monotonic()
                taken = node.load(self.artefact, self.model)
                found = {
                    "first_s": taken["first_s"],
                    "all_s": taken["usable_s"],
                    "peak_mib": taken["peak_mib"],
                    "cpu_s": taken["data_plane_cpu_s"],
                }
                if taken["content"]["origin"] < self.model.total_bytes * 0.99:
                    raise RuntimeError(f"the load was not from the origin: {taken['content']}")
                if restart:
                    node.wait_directory(self.artefact)
                    found["durable_s"] = time.monotonic() - begun
            if restart:
                with Node(chosen, prefix=self.prefix) as node:
                    node.prepare(self.model)
                    again = node.load(self.artefact, self.model)
                found["restart_origin_mib"] = again["content"]["origin"] / (1 << 20)
        return found

    def of_peer(self, make: Callable[[Path], Peer]) -> Round:
        with self.folder() as folder:
            peer = make(folder)
            peer.prefix = tuple(self.prefix)
            peer.env = self.aws()
            with peer.start() as worker:
                answer = peer.go(worker, self.model)
        return {"all_s": answer["usable_s"]}


def peers_of(place: Place, own: argparse.Namespace, missing: dict[str, str]) -> list[Contestant]:
    """The peers that run here."""
    names = [path.name for path in place.model.files]
    url = place.s3.url
    remote = [f"s3://files/{name}" for name in names]

    def boto3(folder: Path) -> Peer:
        words = {"bucket": "files", "keys": names, "folder": str(folder), "concurrency": 8}
        return Peer("boto3, then load", "boto3", "boto3", endpoint=url, **words)

    def awscrt(folder: Path) -> Peer:
        words = {"bucket": "files", "keys": names, "folder": str(folder)}
        return Peer("awscrt, then load", "awscrt", "boto3", endpoint=url, **words)

    def hub(folder: Path) -> Peer:
        words = {"repository": servers.REPOSITORY, "folder": str(folder)}
        return Peer("hub, then load", "hub", "hub", endpoint=place.server.url, **words)

    def runai(concurrency: int) -> Callable[[Path], Peer]:
        name = f"runai s3, c={concurrency}"
        return lambda _: Peer(name, "runai", "runai", files=remote, concurrency=concurrency)

    made: list[Contestant] = []
    for make in (runai(2), boto3, awscrt, hub):
        peer = make(place.scratch)
        peer.env = place.aws()
        if loading.able([peer], own, missing):

            def run(make: Callable[[Path], Peer] = make) -> Round:
                return place.of_peer(make)

            made.append(Contestant(name=peer.name, run=run))
    return made


def contestants_of(place: Place, own: argparse.Namespace, missing: dict[str, str]) -> list[Contestant]:
    url = place.server.url
    _, language = loading.raw_command("raw_receive", place.scratch, [])
    return [
        Contestant(name=RAW, run=place.raw, note=f"{RAW_CONNECTIONS} connections, touched memory, {language}"),
        Contestant(
            name=OURS, run=lambda: place.ours(f"{url}/bucket", restart=True), note="HTTP, verified, written behind"
        ),
        Contestant(
            name=WITHOUT, run=lambda: place.ours(f"{url}/bucket", disk=False), note="the same, no room on disk"
        ),
        Contestant(
            name=OURS_S3,
            run=lambda: place.ours("s3://bucket", **s3_options(place)),
            note="the same from S3, signed",
        ),
        Contestant(
            name=SLOW,
            run=lambda: place.ours(f"{url}/slow/bucket"),
            note=f"HTTP; {SLOW_OF_256 / 256:.1%} of the ranges at {servers.SLOW_BYTES_PER_S >> 10} KiB/s",
        ),
        *peers_of(place, own, missing),
    ]


def s3_options(place: Place) -> dict[str, Any]:
    """How our data plane reaches the S3 server; its credentials are in the environment that it inherits."""
    os.environ.update(place.aws())
    return {"origin": OriginOptions(endpoint=place.s3.url, region="us-east-1")}


def bars_of(results: Results, place: Place, peers: Sequence[str]) -> list[Bar]:
    name = "loopback" if place.shape is None else f"{place.shape.mbit_s:g}:{place.shape.rtt_ms:g}"
    behind = results.ratio(OURS, WITHOUT, "all_s")
    slow = results.ratio(SLOW, OURS, "all_s")
    restart = results.median(OURS, "restart_origin_mib")
    against_peers = [results.ratio(OURS, peer, "all_s") for peer in peers]
    worst = max((ratio for ratio in against_peers if ratio is not None), default=None)
    made: list[Bar] = []
    if place.shape is None:
        ratio = results.ratio(RAW, OURS, "all_s")
        made.append(Bar(name=f"{name}.all_to_raw", value=ratio, limit=LOOPBACK_RATIO_MIN, better="higher"))
    else:
        ratio = results.ratio(OURS, RAW, "all_s")
        made.append(Bar(name=f"{name}.all_to_raw", value=ratio, limit=SHAPED_RATIO_MAX, better="lower"))
        limit = place.model.first_tensor_bytes / place.shape.bytes_per_s if place.shape.mbit_s else 0.0
        limit += FIRST_ROUND_TRIPS * place.shape.rtt_ms / 1e3 + FIRST_EXTRA_S
        first = results.median(OURS, "first_s")
        made.append(Bar(name=f"{name}.first_s", value=first, limit=round(limit, 3), better="lower"))
    return [
        *made,
        Bar(name=f"{name}.all_to_best_peer", value=worst, limit=1.0, better="lower"),
        Bar(name=f"{name}.behind_to_without", value=behind, limit=BEHIND_RATIO_MAX, better="lower"),
        Bar(name=f"{name}.restart_origin_mib", value=restart, limit=1.0, better="lower"),
        Bar(name=f"{name}.slow_to_clean", value=slow, limit=SLOW_RATIO_MAX, better="lower"),
    ]


@contextmanager
def place_of(
    scratch: Path, model: Checkpoint, artefact: ArtefactRef, shape: Shape | None, byte_server: str, s3: str
) -> Iterator[Place]:
    """Server and link while inside. Raises LinkUnavailableError, ServerMissingError."""
    with ExitStack() as stack:
        link: Link | None = None
        address, port = servers.own_address(), PORT if os.geteuid() == 0 else servers.free_port()
        prefix: Sequence[str] = ()
        if shape is not None:
            link = stack.enter_context(links.shaped_link(shape, scratch))
            address, prefix = link.server_address, link.server_prefix
        www = scratch / "www"
        if byte_server == "nginx":
            running = servers.nginx(
                www, scratch / "nginx", address=address, port=port, prefix=prefix, slow_of_256=SLOW_OF_256
            )
        else:
            running = servers.byteserver(www, address=address, port=port, prefix=prefix)
        server = stack.enter_context(running)
        s3_server = server
        if s3 != "nginx":
            standin = servers.s3_standin(s3, www, address=address, port=S3_PORT, prefix=prefix)
            s3_server = stack.enter_context(standin)
        place = Place(scratch, model, artefact, server, s3_server)
        if link is not None:
            place.prefix, place.shape = link.client_prefix, shape
        yield place


def main() -> None:
    made = harness.parser(__doc__)
    loading.arguments(made, gib=1.0)
    made.add_argument(
        "--links",
        nargs="+",
        default=["loopback", "2000:5"],
        metavar="LINK",
        help="`loopback`, or Mbit/s:RTT in ms, as 2000:5; needs root",
    )
    made.add_argument(
        "--server",
        choices=["nginx", "python"],
        default="nginx",
        help="python: where there is no nginx, and slower",
    )
    made.add_argument(
        "--s3-server",
        choices=["nginx", *servers.S3_STANDINS],
        default="nginx",
        help="nginx stands for --server: the fastest, and it looks at no signature",
    )
    made.add_argument(
        "--only", nargs="*", default=None, metavar="NAME", help="only these contestants, and the raw client"
    )
    chosen = harness.options(made)
    with loading.scratch_folder(chosen.own.scratch) as scratch:
        model = loading.make_checkpoint(scratch / "www" / "files", chosen.own)
        artefact = loading.push(model.folder, scratch / "www" / "bucket")
        servers.write_hub_answer(scratch / "www")
        for text in chosen.own.links:
            run_on(text, scratch, model, artefact, chosen)


def run_on(text: str, scratch: Path, model: Checkpoint, artefact: ArtefactRef, chosen: harness.Options) -> None:
    """All contestants on one link. A link that cannot be made here is said to be so, and left out."""
    shape = None if text == "loopback" else links.parse_shape(text)
    missing: dict[str, str] = {}
    try:
        with place_of(scratch, model, artefact, shape, chosen.own.server, chosen.own.s3_server) as place:
            contestants = contestants_of(place, chosen.own, missing)
            if chosen.own.only is not None:
                contestants = [each for each in contestants if each.name == RAW or each.name in chosen.own.only]
            results = harness.measure(contestants, METRICS, chosen)
    except LinkUnavailableError as error:
        say(f"not measured: {text}: {error}")
        return
    ours = {RAW, OURS, WITHOUT, OURS_S3, SLOW}
    bars = bars_of(results, place, [each.name for each in contestants if each.name not in ours])
    part = chosen if len(chosen.own.links) == 1 else harness.part(chosen, text.replace(":", "-"))
    harness.publish(f"weights_origin {text}", results, bars, part, baseline=RAW, missing=missing)


if __name__ == "__main__":
    main()
