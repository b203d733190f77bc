"""What compression costs and saves in time: bytes, FLOPs and launches, and what a machine makes of
them. Arithmetic; nothing here is a measurement, and nothing needs vLLM or a GPU.
"""
