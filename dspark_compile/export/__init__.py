"""ONNX: the optimised graph as a model file, or a folder for onnxruntime-genai.

subject.py      what is exported: a flat signature, and inputs to compare on
program.py      torch.export, then the passes of ``torch.compile``
lowering.py     from the dialect to ONNX's ops: gqa, attention, rotary, norms, weights …
ops.py          those ops, runnable in torch
translate.py    their translation tables
emit.py         the ONNX model, named and annotated
verify.py       comparison with the model, and the first node that differs
write.py        atomic writing
"""

from .entry import export_onnx
from .errors import ExportError, VerificationError
from .options import ExportOptions
from .report import ExportReport

__all__ = ["ExportError", "ExportOptions", "ExportReport", "VerificationError", "export_onnx"]
