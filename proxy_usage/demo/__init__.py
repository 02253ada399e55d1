"""The peers of the sink, for `proxy-usage demo` and for the end-to-end tests.

    traffic ──HTTP──▶ Envoy ──HTTP──▶ upstream
       │                └──ALS──▶ the sink (a process of its own) ──HTTP──▶ billing stand-in
       └─ Truth: what was sent, counted at the client's own socket            └─ sums: what arrived

Everything here speaks over real sockets and counts in integers. `run` never imports this package.
"""
