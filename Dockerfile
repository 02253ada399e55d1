# The sink alone. The stand-ins of docker-compose.yml run from the same image.
FROM python:3.12.11-slim-bookworm AS build
WORKDIR /src
COPY requirements/build.txt requirements/run.txt requirements/
RUN python -m venv /opt/proxy-usage \
    && /opt/proxy-usage/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes \
        -r requirements/build.txt -r requirements/run.txt
# For the compiled fold; without a compiler the image would fold with protobuf.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE NOTICE ./
COPY proxy_usage proxy_usage
# The builder leaves again: the service needs nothing that installs or compiles.
RUN /opt/proxy-usage/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . \
    && /opt/proxy-usage/bin/pip uninstall --yes --quiet setuptools \
    && install -d -o 65532 -g 65532 /state

FROM python:3.12.11-slim-bookworm
ENV PATH=/opt/proxy-usage/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/proxy-usage /opt/proxy-usage
# A named volume takes over this owner, so that the store is writable without root.
COPY --from=build --chown=65532:65532 /state /var/lib/proxy-usage
USER 65532:65532
WORKDIR /var/lib/proxy-usage
VOLUME /var/lib/proxy-usage
EXPOSE 9001 9090
STOPSIGNAL SIGTERM
# Liveness only: an endpoint that refuses usage makes the sink unready, and a restart would not help.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9090/healthz', timeout=4)"]
ENTRYPOINT ["python", "-m", "proxy_usage"]
CMD ["run", "--config", "/etc/proxy-usage/proxy-usage.yaml"]
