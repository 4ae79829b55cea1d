"""One file per backend, each with the same names: NAME, DIFFERENTIABLE, supports, forward, backward, step, stack,
wavefront, describe."""
