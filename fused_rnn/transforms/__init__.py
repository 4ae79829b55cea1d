"""What an op of ours is to torch: its rule under vmap, the gradient it has by itself, its floating-point operations."""
