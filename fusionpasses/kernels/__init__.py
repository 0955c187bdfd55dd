"""Triton kernels. They import torch and triton only; when they run, and on what, is for the providers to say."""
