"""Tensors in transit: a model as one flat frame, its encodings, and blobs."""
