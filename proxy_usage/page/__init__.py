"""The operator's page: what it shows, as one document made of one snapshot, and its files.

    parts of the service ──▶ Snapshot ──▶ problems ──▶ document ──▶ /api/state ──▶ the page, `status --watch`
    several workers' ──▶ merging ──▲

Everything here but ``assets`` is pure: integers and text in, integers and text out.
"""
