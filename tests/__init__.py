"""Tests and benchmarks.

A package, because ``python -m tests.benchmarks`` would else find the ``tests`` that torch-fidelity's wheel installs.
"""
