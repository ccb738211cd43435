"""Tiny models of the causal-LM families of transformers, run through the compiler and through eager
mode."""
