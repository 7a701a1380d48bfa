"""The parts of benchmarks/budget.py."""
