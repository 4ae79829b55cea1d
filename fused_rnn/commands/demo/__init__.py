"""The demonstration: a character model trained twice, with torch.nn and, by the one-line swap, with fused_rnn."""
