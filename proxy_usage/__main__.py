"""``python -m proxy_usage``: the same as ``proxy-usage``."""

import sys

from proxy_usage.cli import main

sys.exit(main())
