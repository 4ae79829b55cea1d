"""The plain PyTorch loop over time: the judge of all others, and what a second derivative differentiates."""
