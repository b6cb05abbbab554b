"""Evaluation: scripts, and the modules that they share. Run them from the folder above: `python eval/eval_fid.py`."""

from ldm import runtime  # noqa: F401  (so the runtime is imported before MindSpore, whichever module comes first)
