"""The one place that touches ComfyUI's internals; each touch names the versions in which it was seen to hold.

The node classes in nodes/ use ComfyUI's public node API beside it.
"""
