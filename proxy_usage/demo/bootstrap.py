"""The demo's Envoy configuration, as the dictionary that is written to a file for it.

What exact metering needs is explained in ``deploy/envoy/envoy.yaml``: tenant tags from
route and virtual host metadata (route metadata itself does not travel), ``use_remote_address``, a listener
log, and a sink cluster with health checks and small windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from proxy_usage.demo.loggers import BY_CHAIN, BY_LISTENER, TYPE, Logging, duration
from proxy_usage.demo.truth import Tenant

Address = tuple[str, int]


class TcpProxy(NamedTuple):
    """Connections that are passed on as they are: a listener of its own or, with ``sni``, a filter chain of
    the listener ``tls``."""

    name: str
    """Of the listener or of the filter chain."""
    tenant: str = ""
    """In the listener's metadata."""
    sni: str = ""
    """Server name, or ``*.example.com``, of the TLS connections that the chain takes, without ending them."""
    project: str = BY_LISTENER
    """What the tag ``project_name`` says (``demo.loggers``)."""
    log: str = "tcp"
    """Log name."""
    listen: Address = ("127.0.0.1", 0)


@dataclass(frozen=True, slots=True)
class EnvoyOptions:
    """What an Envoy of the demo or of a test looks like."""

    tenants: Sequence[Tenant]
    upstream: Address
    als: Sequence[Address] = ()
    """Sinks of the access log rows; none: no gRPC logger at all."""
    streams_als: Address | None = None
    """The owner of rows of long streams. Set: loggers are split by filters, which needs
    ``flush_interval_ms``."""
    listen: Address = ("127.0.0.1", 0)
    admin: Address = ("127.0.0.1", 0)
    node_id: str = "demo-envoy"
    region: str = "local-1"
    buffer_flush_ms: int = 200
    buffer_bytes: int = 16 << 20
    flush_interval_ms: int | None = None
    """Envoy's access_log_flush_interval: periodic rows of open streams."""
    health_check: bool = True
    access_log: Path | None = None
    """A file that gets one JSON line per request: a second opinion, independent of the sink."""
    gateway: str = "edge"
    """Name of the Gateway, for the dimensions that Envoy has no field for."""
    extra_tags: Sequence[dict[str, Any]] = ()
    """Further custom tags of the loggers of requests and TCP connections."""
    tcp: Sequence[TcpProxy] = ()
    tcp_upstream: Address | None = None
    """Where TCP proxies go."""
    tunnel: Address | None = None
    """Where CONNECT ends and goes on as plain TCP; None: CONNECT is refused."""
    grpc_upstream: Address | None = None
    """Where paths under ``/demo.Echo/`` go, by HTTP/2."""
    astray_als: Address | None = None
    """A sink that gets a copy of every periodic row, by mistake as it were."""

    def logging(self) -> Logging:
        """What its loggers have in common."""
        split = self.flush_interval_ms if self.streams_als is not None else None
        return Logging(
            sinks=bool(self.als),
            split_at_ms=None if split is None else split * 9 // 10,
            flush_ms=self.buffer_flush_ms,
            buffer_bytes=self.buffer_bytes,
            gateway=self.gateway,
            extra_tags=self.extra_tags,
            file=self.access_log,
            astray=self.astray_als is not None,
        )


def bootstrap(options: EnvoyOptions) -> dict[str, Any]:
    """The whole Envoy bootstrap.

    Its listeners are named ``http``, ``tls`` and as ``options.tcp`` names them.
    """
    clusters = [_upstream("app", [options.upstream]), _upstream("nobody", [])]
    if options.tcp_upstream is not None:
        clusters.append(_upstream("tcp", [options.tcp_upstream]))
    if options.tunnel is not None:
        clusters.append(_upstream("tunnel", [options.tunnel]))
    if options.grpc_upstream is not None:
        clusters.append({**_upstream("grpc", [options.grpc_upstream]), **_http2({})})
    if options.als:
        clusters.append(_sink("usage", options.als, options))
    if options.streams_als is not None:
        clusters.append(_sink("usage_streams", [options.streams_als], options))
    if options.astray_als is not None:
        clusters.append(_sink("usage_astray", [options.astray_als], options))
    listeners = [
        _listener(options),
        *(_tcp_listener(proxy, options) for proxy in options.tcp if not proxy.sni),
    ]
    if chains := [proxy for proxy in options.tcp if proxy.sni]:
        listeners.append(_tls_listener(chains, options))
    return {
        "node": {"id": options.node_id, "cluster": "demo", "locality": {"region": options.region}},
        "admin": {"address": _address(options.admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def _address(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address[0], "port_value": address[1]}}


def _listener(options: EnvoyOptions) -> dict[str, Any]:
    manager: dict[str, Any] = {
        "@type": f"{TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "use_remote_address": True,  # or clients choose their stream's id through x-request-id
        "preserve_external_request_id": False,
        "upgrade_configs": [
            {"upgrade_type": kind}
            for kind in ("websocket", "CONNECT")
            if kind != "CONNECT" or options.tunnel is not None
        ],
        "access_log": options.logging().requests(),
        "route_config": {
            "name": "demo",
            "virtual_hosts": [_virtual_host(tenant, options) for tenant in options.tenants],
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPE}extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    if options.flush_interval_ms is not None:
        manager["access_log_options"] = {"access_log_flush_interval": duration(options.flush_interval_ms)}
    return {
        "name": "http",
        "address": _address(options.listen),
        "access_log": options.logging().listener(),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _tcp_listener(proxy: TcpProxy, options: EnvoyOptions) -> dict[str, Any]:
    return {
        "name": proxy.name,
        "address": _address(proxy.listen),
        "metadata": {"filter_metadata": {"datum-gateway": {"project_name": proxy.tenant}}},
        "access_log": options.logging().listener(proxy.project),
        "filter_chains": [{"filters": [_tcp_filter(proxy, options)]}],
    }


def _tls_listener(chains: Sequence[TcpProxy], options: EnvoyOptions) -> dict[str, Any]:
    inspector = {"@type": f"{TYPE}extensions.filters.listener.tls_inspector.v3.TlsInspector"}
    return {
        "name": "tls",
        "address": _address(chains[0].listen),
        "access_log": options.logging().listener(BY_CHAIN),
        "listener_filters": [{"name": "envoy.filters.listener.tls_inspector", "typed_config": inspector}],
        "filter_chains": [
            {
                "name": proxy.name,
                "filter_chain_match": {"server_names": [proxy.sni]},
                "filters": [_tcp_filter(proxy, options)],
            }
            for proxy in chains
        ],
    }


def _tcp_filter(proxy: TcpProxy, options: EnvoyOptions) -> dict[str, Any]:
    config: dict[str, Any] = {
        "@type": f"{TYPE}extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "tcp",
        "cluster": "tcp",
        "access_log": options.logging().connections(proxy.log, proxy.project),
    }
    if options.flush_interval_ms is not None:
        config["access_log_options"] = {"access_log_flush_interval": duration(options.flush_interval_ms)}
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": config}


def _virtual_host(tenant: Tenant, options: EnvoyOptions) -> dict[str, Any]:
    metadata = {"filter_metadata": {"datum-gateway": {"project_name": tenant.name}}}

    def route(name: str, match: dict[str, Any], action: dict[str, Any]) -> dict[str, Any]:
        return {"name": tenant.route(name), "match": match, "metadata": metadata, **action}

    routes = []
    if options.tunnel is not None:
        upgrade = {"upgrade_type": "CONNECT", "connect_config": {}}
        action = {"cluster": "tunnel", "timeout": "0s", "upgrade_configs": [upgrade]}
        routes.append(route("tunnel", {"connect_matcher": {}}, {"route": action}))
    if options.grpc_upstream is not None:
        action = {"cluster": "grpc", "timeout": "0s"}
        routes.append(route("grpc", {"prefix": "/demo.Echo/"}, {"route": action}))
    return {
        "name": tenant.name,
        "domains": [tenant.host, f"{tenant.host}:*"],  # CONNECT names a port
        "metadata": metadata,
        "routes": [
            *routes,
            route("api", {"prefix": "/api/"}, {"route": {"cluster": "app", "prefix_rewrite": "/"}}),
            route("broken", {"prefix": "/broken"}, {"route": {"cluster": "nobody"}}),
            route(
                "static",
                {"prefix": "/static"},
                {"direct_response": {"status": 200, "body": {"inline_string": "static\n"}}},
            ),
            route("web", {"prefix": "/"}, {"route": {"cluster": "app", "timeout": "0s"}}),
        ],
    }


def _endpoints(name: str, addresses: Sequence[Address]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _address(address)}} for address in addresses]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


def _upstream(name: str, addresses: Sequence[Address]) -> dict[str, Any]:
    limits = {"max_connections": 4096, "max_pending_requests": 65536, "max_requests": 65536}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": _endpoints(name, addresses),
    }


def _http2(options: dict[str, Any]) -> dict[str, Any]:
    """What makes a cluster's connections HTTP/2."""
    protocol = {
        "@type": f"{TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": options},
    }
    return {
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol
        }
    }


def _sink(name: str, addresses: Sequence[Address], options: EnvoyOptions) -> dict[str, Any]:
    http2 = {
        "initial_stream_window_size": 65535,
        "initial_connection_window_size": 65535,
        "connection_keepalive": {"interval": "30s", "timeout": "20s"},
    }
    cluster: dict[str, Any] = {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "0.5s",
        "per_connection_buffer_limit_bytes": 32768,
        "load_assignment": _endpoints(name, addresses),
        **_http2(http2),
    }
    if options.health_check:
        # With the sink away, rows then wait in Envoy's buffer instead of being sent to nobody.
        cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": 0}}
        cluster["health_checks"] = [
            {
                "timeout": "0.3s",
                "interval": "0.25s",
                "no_traffic_interval": "0.25s",
                "unhealthy_interval": "0.25s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "tcp_health_check": {},
            }
        ]
    return cluster
