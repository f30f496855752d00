"""The report: all of a run on one page that needs no network, with the numbers of every figure beside it."""
