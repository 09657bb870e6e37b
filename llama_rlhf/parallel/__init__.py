"""Tensor parallelism by hand, on FairScale's process groups. The only package that starts process groups and chooses devices."""
