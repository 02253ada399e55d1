"""Run by Ceilometer's own Python: builds its samples of what stands on standard input and publishes them.

    build/ceilometer-venv/bin/python ceilometer_publisher.py URL < samples.json

The samples are given by value alone, so that keys, order and text are Ceilometer's.
"""

import json
import sys
from urllib.parse import urlsplit

from ceilometer.publisher.http import HttpPublisher
from ceilometer.sample import Sample
from ceilometer.service import prepare_service


def main(url: str) -> None:
    """Publishes to ``url``, whose parameters are the publisher's settings."""
    conf = prepare_service(argv=["ceilometer"], config_files=[])
    samples = [Sample(**fields) for fields in json.load(sys.stdin)]
    HttpPublisher(conf, urlsplit(url)).publish_samples(samples)


if __name__ == "__main__":
    main(sys.argv[1])
