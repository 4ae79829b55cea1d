"""One layer on a GPU, whatever the backend: the products outside the loops, by torch.mm, around the backend's loops."""
