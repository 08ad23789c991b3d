"""What a network is and where its weights lie: torch, no devices, no Ray.

`spec` is free of torch, so that planning starts fast and runs anywhere. Nothing here imports
the layers above.
"""
