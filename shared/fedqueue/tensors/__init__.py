"""A model as one flat frame, and its encodings on the wire."""
