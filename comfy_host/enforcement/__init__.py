"""The operator's policy, enforced in ComfyUI: when a prompt is queued, as its nodes run, around every sampling."""
