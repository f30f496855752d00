"""Models: open_clip's, and the experts grafted into them."""
