"""Images from trained models: samples and restored images, with the files that describe them."""
