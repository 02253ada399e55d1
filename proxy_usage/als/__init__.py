"""Our subset of Envoy's access log schema; only ``proxy_usage.decode`` may import what is generated here."""
