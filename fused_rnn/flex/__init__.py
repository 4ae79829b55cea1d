"""A user's own cell: a step written in PyTorch, traced into a program that the loops run."""

from fused_rnn.flex.cell import UserCell, cell

__all__ = ["UserCell", "cell"]
