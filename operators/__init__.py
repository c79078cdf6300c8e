"""What an operator sets outside every graph: policy, signatures, record; no ComfyUI here."""
