"""The commands: `python -m fused_rnn info | bench | demo`. No model imports any of it."""
