"""The Triton backend's kernels. The package imports no Triton: the kernels' modules do, when one is first wanted."""
