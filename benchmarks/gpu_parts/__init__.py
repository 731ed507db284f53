"""The parts of benchmarks/gpu.py. Each has `measure(setting)`, which returns results, and `build_tables(results)`."""
