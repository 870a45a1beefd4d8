"""The recipe that made the embedded model: `python -m semct.training` repeats it from nothing."""
