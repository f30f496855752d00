"""Data: from image URLs, tars or folders to batches, one module per step."""
