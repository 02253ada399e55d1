"""Generated from ``protos/proxy_usage/als/v1/als.proto`` by ``python protos/generate.py``."""
