"""From a configuration to the parts, wired: the one place that knows how they fit."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce

from proxy_usage.admission import Admission, SanPattern
from proxy_usage.attribution import CACHE, Attributor
from proxy_usage.config import Config
from proxy_usage.config.fields import split_address
from proxy_usage.config.outputs import OutputConfig
from proxy_usage.connections import Connections
from proxy_usage.decode import EnvoySettings, Fold, SkipTest, Split, new_fold
from proxy_usage.decode.choice import CHOICE
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.errors import ConfigError
from proxy_usage.events import Mint
from proxy_usage.intake import Intake, Loss, together
from proxy_usage.metrics import Metrics
from proxy_usage.model import Meter, Origin, Quantity
from proxy_usage.nodes import Nodes
from proxy_usage.pipeline import Pipeline, Port
from proxy_usage.receiver import Receiver, ReceiverLimits, Room, RoomLimits, Sink, Tap, TlsFiles
from proxy_usage.samples import check_formats, check_samples
from proxy_usage.service.adopting import adopt_all, go_on
from proxy_usage.service.collector import collect_young
from proxy_usage.service.housekeeping import Housekeeping
from proxy_usage.service.opening import Past, crash_loss, learn, recover, salvages
from proxy_usage.service.repairs import Repairs
from proxy_usage.store import Checkpoints, Database, Merger, Queue, Retention
from proxy_usage.store.restore import finish, restore
from proxy_usage.store.thread import StoreThread
from proxy_usage.streams import Streams
from proxy_usage.turn import Layout, OutputSlot, Recovered, Turn
from proxy_usage.windows import Windows

PortSink = Callable[[Port, Origin, Split, int], None]


def clock_ms() -> int:
    """The wall clock, in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Storage:
    """The opened store and what the process before this one left in it."""

    database: Database
    checkpoints: Checkpoints
    queue: Queue
    intake: Intake
    loss: Loss
    slots: tuple[OutputSlot, ...]
    recovered: Recovered
    past: Past

    def close(self) -> None:
        """Gives the store up."""
        self.intake.close()
        self.database.close()


def source(config: Config) -> str:
    """The CloudEvents source, one for all outputs since an event has one body."""
    return config.outputs[0].source


def build_mint(config: Config) -> Mint:
    """What makes events of windows."""
    return Mint(config.meter_list(), tuple(config.dimensions), source(config), config.windows.length)


def build_folds(config: Config, attributor: Attributor) -> dict[Port, Fold]:
    """What folds rows, by the present rules: one for the only port, or one for each of the two."""
    envoy = config.envoy
    plan = config.fold_plan()
    settings = EnvoySettings(
        flush_interval_ms=envoy.flush_interval,
        connection_logs=frozenset(envoy.connection_logs),
        untyped=envoy.untyped,
        connection_id=envoy.tags.connection_id,
        duration_ms=envoy.tags.duration_ms,
        emit_us=envoy.tags.emit_us,
        connections=Quantity.CONNECTION_NS in plan.quantities,
    )
    skip = [SkipTest(rule.reason, status=rule.if_.statuses, **rule.if_.regexes) for rule in config.skip]
    ports = {Port.ALL: replace(settings, short_only=envoy.long_streams == "elsewhere")}
    if config.listen.streams is not None:
        ports = {Port.SHORT: replace(settings, short_only=True), Port.STREAMS: settings}
    return {
        port: new_fold(
            plan,
            accepts=attributor.accepts,
            plain=attributor.plain_rules,
            envoy=envoy_settings,
            skip=skip,
            keys=config.windows.max_keys,
        )
        for port, envoy_settings in ports.items()
    }


def build_attributor(config: Config) -> Attributor:
    """The tenant rules."""
    return Attributor(config.tenant, config.dimensions, cache=max(CACHE, config.windows.max_keys // 2))


def open_storage(
    config: Config, *, from_backup: bool = False, adopts: bool = True, make: bool = True
) -> Storage:
    """Opens the store, finds out what a crash lost, and closes what was open under another layout.

    A file that is damaged or not ours is set aside, and a fresh store opened.

    Args:
        from_backup: what waits becomes dead letters, since it may have been sent after the backup was made.
        adopts: it takes over the stores of workers that are no longer configured: worker 0 does.
        make: False: there must be a store already.

    Raises:
        StoreError: the store cannot be used; ConfigError: it does not fit the configuration, or the events
            that the configuration makes are none.
    """
    defaults = [dimension.default for dimension in config.dimensions.values()]
    check_samples(build_mint(config), defaults)
    check_formats(config.outputs, build_mint(config), defaults)
    now_ms = clock_ms()
    database = Database(config.store.path, max_bytes=config.store.max_bytes, aside_ms=now_ms, make=make)
    try:
        checkpoints, recovered = recover(database, config.tenant.unattributed.max_identities, now_ms)
        queue = Queue(database)
        slots = queue.register([_slot(output) for output in config.outputs], now_ms)
        past = Past(learn(database), restore(database, now_ms, wanted=from_backup))
        intake = Intake(config.store.path.with_name(config.store.path.name + ".intake"))
        go_on(database, intake)
        loss = crash_loss(intake, recovered, past)
        layout = Layout.of(config.meter_list(), tuple(config.dimensions), config.windows.length)
        if recovered.layout is not None and recovered.layout != layout and recovered.cells:
            checkpoints.outputs = slots
            _close_all(config, checkpoints, recovered.layout, recovered)
            recovered = checkpoints.recover()
        checkpoints.begin(layout, slots, loss.rows, unknown=loss.unknown, unexplained=loss.unexplained)
        if past.restored is not None:
            past = past._replace(restored=finish(database, past.restored))
        adopted: Sequence[Loss] = ()
        if adopts:
            orphans = partial(open_storage, from_backup=from_backup, adopts=False)
            adopted = adopt_all(config, database, intake, layout, now_ms, orphans)
        past = past._replace(salvages=salvages(database, slots, layout, partial(_mint_of, config)))
        loss = loss._replace(
            unknown=(*loss.unknown, *(node for aside in past.adopted for node in aside.nodes))
        )
        loss = reduce(together, adopted, loss)
        if adopted or (recovered.layout is not None and recovered.layout != layout):
            checkpoints = Checkpoints(database, max_held=config.tenant.unattributed.max_identities)
            checkpoints.outputs, recovered = slots, checkpoints.recover()
    except BaseException:  # interrupted, too: no lock on the store stays behind
        database.close()
        raise
    return Storage(database, checkpoints, queue, intake, loss, slots, recovered, past)


def build_housekeeping(
    config: Config, storage: Storage, thread: StoreThread, metrics: Metrics
) -> Housekeeping:
    """What keeps the store within its bounds."""
    retention = Retention(
        storage.database,
        ledger_max_bytes=config.store.ledger_max_bytes,
        keep_delivered_ms=config.store.keep_delivered,
        keep_sums_ms=config.store.keep_sums,
        keep_held_ms=config.tenant.unattributed.keep,
    )
    merger = Merger(storage.database, build_mint(config))
    return Housekeeping(storage.database, storage.checkpoints, retention, merger, thread, metrics)


def build_repairs(config: Config, storage: Storage, attributor: Callable[[], Attributor]) -> Repairs:
    """What people may decide about usage that is stuck."""
    return Repairs(config, storage.database, storage.checkpoints, build_mint(config), attributor, clock_ms)


@contextmanager
def opened_repairs(config: Config, *, minting: bool) -> Iterator[Repairs]:
    """The repairs of a store that no service runs on.

    Args:
        minting: usage may become events, which the configured outputs are given.

    Raises:
        StoreError: the store cannot be used; ConfigError: ``minting``, and an output is gone that has events.
    """
    database = Database(config.store.path, max_bytes=config.store.max_bytes)
    try:
        checkpoints = Checkpoints(database, max_held=config.tenant.unattributed.max_identities)
        if minting:
            slots = [_slot(output) for output in config.outputs]
            checkpoints.outputs = Queue(database).register(slots, clock_ms())
        attributor = partial(build_attributor, config)
        yield Repairs(config, database, checkpoints, build_mint(config), attributor, clock_ms)
    finally:
        database.close()


def _close_all(config: Config, checkpoints: Checkpoints, layout: Layout, recovered: Recovered) -> None:
    """Closes the windows left open by a process with other meters or dimensions, under those."""
    meters, mint = layout.meters, _mint_of(config, layout)
    windows = build_windows(config)
    windows.restore(recovered.cells)
    number = recovered.turn
    while len(windows):
        number += 1
        turn = windows.begin(clock_ms(), everything=True)
        checkpoints.commit(Turn(turn, (0,) * len(meters), number), mint, clock_ms())
        windows.commit(turn)


def _mint_of(config: Config, layout: Layout) -> Mint:
    """What makes events of windows of another layout."""
    meters = tuple(
        Meter(name, kind, unit, Quantity(quantity), divisor)
        for name, kind, unit, quantity, divisor in layout.meters
    )
    return Mint(meters, layout.dimensions, source(config), layout.window_ms)


def _slot(output: OutputConfig) -> OutputSlot:
    return OutputSlot(0, output.name, output.format == "none", output.from_, output.until)


def build_windows(config: Config) -> Windows:
    """The windows, empty. Siblings on other machines get another salt, by host and store."""
    windows = config.windows
    return Windows(
        length_ms=windows.length,
        grace_ms=windows.grace,
        reopen_ms=windows.reopen,
        spread_ms=windows.length // 4,
        salt=f"{socket.gethostname()}\0{config.store.path}".encode(),
        defaults=tuple(dimension.default for dimension in config.dimensions.values()),
        max_keys=windows.max_keys,
        max_tenants=config.tenant.max_tenants,
    )


def build_pipeline(config: Config, storage: Storage) -> Pipeline:
    """The pure core, going on where the process before this one was last durable."""
    windows = build_windows(config)
    windows.restore(storage.recovered.cells)
    attributor = build_attributor(config)
    return Pipeline(
        build_folds(config, attributor),
        attributor,
        windows,
        quantities=config.fold_plan().quantities,
        counts=storage.intake.counts,
        max_held=config.tenant.unattributed.max_identities,
        last_turn=storage.recovered.turn,
        ended=storage.recovered.ended,
        streams=build_streams(config, storage.recovered),
        connections=build_connections(config, storage.recovered),
        max_identities=config.listen.limits.identities,
        # The compiled fold's table holds no objects: Python's own count is right, and looks often enough.
        stepped=collect_young if CHOICE.native is None else lambda: None,
    )


def build_connections(config: Config, recovered: Recovered | None = None) -> Connections | None:
    """Who used which connection, where connections are metered."""
    if Quantity.CONNECTION_NS not in config.fold_plan().quantities:
        return None
    connections = Connections(limit=config.streams.max)
    if recovered is not None:
        connections.restore(recovered.connections)
    return connections


def build_streams(config: Config, recovered: Recovered | None = None) -> Streams | None:
    """The memory of long streams, where Envoy sends rows of them at all."""
    if config.envoy.flush_interval is None:
        return None
    streams = Streams(
        config.fold_plan().quantities,
        interval_ms=config.envoy.flush_interval,
        limit=config.streams.max,
        expire=config.streams.expire,
        remember_ms=config.streams.remember,
    )
    if recovered is not None:
        streams.restore(recovered.streams)
    return streams


def build_receivers(
    config: Config, sink: PortSink, tap: Tap, metrics: Metrics, nodes: Nodes
) -> tuple[Receiver, ...]:
    """The gRPC listeners: one for everything, or one for short rows and one for long streams."""
    limits = config.listen.limits
    room = Room(RoomLimits(limits.memory, limits.new_streams, limits.first_message))
    build = partial(_build_receiver, config, tap=tap, metrics=metrics, nodes=nodes, room=room)
    shared = config.workers > 1
    if config.listen.streams is None:
        return (build(config.listen.grpc, partial(sink, Port.ALL), shared=shared),)
    return (
        build(config.listen.grpc, partial(sink, Port.SHORT), shared=shared),
        build(config.listen.streams, partial(sink, Port.STREAMS)),
    )


def _build_receiver(
    config: Config,
    address: str,
    sink: Sink,
    *,
    tap: Tap,
    metrics: Metrics,
    nodes: Nodes,
    room: Room,
    shared: bool = False,
) -> Receiver:
    host, port = split_address(address)
    limits = config.listen.limits
    return Receiver(
        host,
        port,
        sink=sink,
        tap=tap,
        node_paths=config.fold_plan().node_paths,
        limits=ReceiverLimits(
            limits.message,
            limits.window,
            limits.headers,
            limits.connections,
            limits.streams_per_connection,
            limits.connection_age,
            shared,
        ),
        metrics=metrics,
        nodes=nodes,
        room=room,
        clock_ms=clock_ms,
        admission=build_admission(config),
        tls=build_tls(config),
    )


def build_tls(config: Config) -> TlsFiles | None:
    """The certificates of the gRPC ports; None for plaintext."""
    tls = config.listen.tls
    if tls is None or tls.cert_file is None or tls.key_file is None:
        return None
    return TlsFiles(tls.cert_file, tls.key_file, tls.client_ca_file)


def build_admission(config: Config) -> Admission:
    """Who may send.

    Raises:
        ConfigError: an allowed name has no type.
    """
    listen, tls = config.listen, config.listen.tls
    return Admission(
        allow=_allowed(tls.allow_san if tls else ()),
        token=TokenFile(listen.token_file).token if listen.token_file else None,
        node_from_san=re.compile(tls.node_from_san) if tls and tls.node_from_san else None,
    )


def _allowed(texts: tuple[str, ...]) -> list[SanPattern]:
    try:
        return [SanPattern.parse(text) for text in texts]
    except ValueError as error:
        raise ConfigError(
            f"listen.tls.allow_san: {error}", hint="write uri:spiffe://trust/… or dns:*.example.org"
        ) from None
