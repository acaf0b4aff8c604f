"""CUDA kernels: torch-free ``.cu`` files behind a plain C interface, found, built and loaded on first use."""

from __future__ import annotations
