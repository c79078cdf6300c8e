"""The demo: a real ComfyUI server, driven through HTTP and websocket, and a report of what it drew."""
