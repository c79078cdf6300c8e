"""The second engine: an unmodified checkout of kohya-ss/sd-scripts."""
