"""Evaluation: what a model can do, on data it has not seen, always beside what guessing would give."""
