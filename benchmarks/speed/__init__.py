"""What `benchmarks/run.py` measures with: contenders, clocks, FLOPs, cases, reports."""
