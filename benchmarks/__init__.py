"""Which hypergradient, at what cost, beside what a user would pick instead: ``python -m benchmarks``."""
