"""Evaluation on a folder as DataComp fills it: 40 data sets, their layouts and their metrics."""
