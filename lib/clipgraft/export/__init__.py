"""Models in the forms of other programs: `python -m clipgraft.export FORMAT MODEL_FOLDER OUT`."""
