"""Registration of two scans: AdaReg on embeddings, refinement inside the overlap, deformation, and what is written."""
