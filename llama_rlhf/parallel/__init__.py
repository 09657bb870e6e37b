"""Tensor parallelism by hand, on FairScale's process groups. The only package that knows ranks and devices."""
