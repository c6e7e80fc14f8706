"""Weights as user code gets them: tensors over landing areas or files. Frameworks are imported when asked for."""
