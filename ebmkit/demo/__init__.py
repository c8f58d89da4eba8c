"""The demo page of a model: classify, denoise, attack and sample in a browser."""
