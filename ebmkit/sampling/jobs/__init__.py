"""Jobs that sample or restore images, and the files that describe the images."""
