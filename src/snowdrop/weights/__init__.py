"""Weights as user code gets them: tensors over landing areas or files. No framework is imported until asked for."""
