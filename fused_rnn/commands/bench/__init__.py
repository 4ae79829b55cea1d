"""Measuring fused_rnn against torch.nn: the grid, the clock, the limits, the report.

Runs as `python -m fused_rnn bench`; the suites in benchmarks/ share the grid and the providers.
"""
